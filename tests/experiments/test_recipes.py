"""The published settings, variant by variant."""

import types

import jax
import pytest

from nfnet_jax import errors
from nfnet_jax.cli import summary
from nfnet_jax.config import durations, lookup, resolve, steps
from nfnet_jax.config import experiment as experiment_lib
from nfnet_jax.experiments.configs import nfnet as nfnet_configs
from nfnet_jax.models import nfnet, registry

# Dropout, training and test pixels, RandAugment (arXiv 2102.06171, table 1).
PUBLISHED = {
  'f0': (0.2, 192, 256, 5),
  'f1': (0.3, 224, 320, 10),
  'f2': (0.4, 256, 352, 10),
  'f3': (0.4, 320, 416, 15),
  'f4': (0.5, 384, 512, 15),
  'f5': (0.5, 416, 544, 15),
  'f6': (0.5, 448, 576, 15),
  'f7': (0.5, 480, 608, 15),
}
NAMES = [*PUBLISHED, *(f'{name}_plus' for name in PUBLISHED)]


load = lookup.load


@pytest.mark.parametrize('name', NAMES)
def test_recipe(name):
  resolved = steps.prepare_config(load(name))
  dropout, train_size, test_size, magnitude = PUBLISHED[name[:2]]
  assert resolved.model.name == f'nfnet_{name}'
  assert nfnet.VARIANTS[name].dropout == dropout
  data = resolved.data
  assert (data.image_size, data.eval_size) == (train_size, test_size)
  assert (data.randaugment_layers, data.randaugment_magnitude) == (4, magnitude)
  assert data.mixup
  assert data.cutmix
  assert (data.partners, data.crop, data.flip) == ('fresh', 'distorted', True)
  assert (data.eval_crop, data.eval_margin) == ('squash', 32)
  assert resolved.dataset == 'imagenet2012'
  assert (data.train_split, data.eval_split) == ('train', 'validation')
  assert (resolved.batch_size, resolved.train_for) == (4096, '360 epochs')
  assert data.shards == 128
  assert resolved.optimizer.to_dict() == {
    'learning_rate': 1.6,
    'base_rate': 0.1,
    'warmup': '5 epochs',
    'final_learning_rate': 0.0,
    'decay_every': None,
    'decay_factor': 0.97,
    'momentum': 0.9,
    'nesterov': True,
    'rms_decay': None,
    'weight_decay': 2e-5,
    'clipping': 0.01,
    'clip_by': 'unit',
    'clip_statistics': 'group',
    'trust_coefficient': None,
    'sam_rho': 0.0,
    'sam_share': 0.2,
  }
  assert resolved.label_smoothing == 0.1
  assert resolved.ema_decay == 0.99999
  assert resolved.model.stochdepth_rate == 0.25


@pytest.mark.parametrize(
  ('name', 'top1', 'step_ms'), [('f5', 86.3, 1958.0), ('f6', 86.5, 2774.1)]
)
def test_recipe_with_sam(name, top1, step_ms):
  expected = steps.prepare_config(load(name)).to_dict()
  expected['optimizer'] |= {'sam_rho': 0.05, 'sam_share': 0.2}
  resolved = steps.prepare_config(load(f'{name}_sam'))
  assert resolved.to_dict() == expected
  line = nfnet_configs.CONFIGS[f'{name}_sam']
  assert f'{top1} % top-1' in line
  assert f'{112_602 * step_ms / 1000 / 3600:.1f} h ' in line


def test_recipe_with_multiplicity():
  """Against arXiv 2105.13343; a shard of 128 has one pair of images."""
  expected = steps.prepare_config(load('f5_sam')).to_dict()
  expected['data'] |= {'multiplicity': 16, 'partners': 'in_batch'}
  resolved = steps.prepare_config(load('f5_sam_multiplicity'))
  assert resolved.to_dict() == expected
  line = nfnet_configs.CONFIGS['f5_sam_multiplicity']
  assert 'with SAM and each image 16 times: 86.78 % top-1' in line


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'multiplicity': 3}, 'data.shards times data.multiplicity'),
    (
      {'multiplicity': 64, 'partners': 'in_batch', 'shards': 64},
      'twice data.shards times data.multiplicity',
    ),
    ({'multiplicity': 0}, 'data.multiplicity'),
    ({'multiplicity': 2, 'jpeg_scaling': True}, 'data.jpeg_scaling'),
  ],
)
def test_impossible_multiplicity(changes, message):
  config = load('f0')
  config.data.update(changes)
  with pytest.raises(errors.InputError, match=message):
    steps.prepare_config(config)


def test_sam_reaches_the_trainer_and_the_log(digits):
  config = load('digits')
  config.model.name = 'nfnet_pico'
  expected = ', clipping 0.01 by unit, SAM rho 0.05 on 30 %\n'
  resolved = steps.prepare_config(config)
  assert 'SAM' not in summary.summary(
    experiment_lib.Experiment(resolved, digits)
  )
  config.optimizer.update(sam_rho=0.05, sam_share=0.3)
  resolved = steps.prepare_config(config)
  experiment = experiment_lib.Experiment(resolved, digits)
  assert expected in summary.summary(experiment)
  trainer = experiment.trainer
  assert (trainer.sam_rho, trainer.sam_share) == (0.05, 0.3)


def test_published_length():
  units = durations.Units(batch_size=4096, examples=1_281_167)
  assert int(units.steps('360 epochs')) == 112_602
  assert units.steps('5 epochs') == pytest.approx(1563.92, abs=0.01)


def test_what_depends_on_the_variant_follows_an_override():
  overridden = nfnet_configs.get_config()
  overridden.model.name = 'nfnet_f3'
  overridden.batch_size = 1024
  resolved = steps.prepare_config(overridden)
  assert resolved.data.image_size == 320
  assert resolved.data.randaugment_magnitude == 15
  assert resolved.optimizer.learning_rate == 0.4


def test_a_model_without_published_magnitude_has_no_randaugment():
  overridden = nfnet_configs.get_config()
  overridden.model.name = 'nfnet_nano'
  assert steps.prepare_config(overridden).data.randaugment_layers == 0


@pytest.mark.parametrize(
  ('platform', 'dtype'),
  [('cpu', 'float32'), ('tpu', 'bfloat16'), ('gpu', 'bfloat16')],
)
def test_accelerators_compute_in_bfloat16(platform, dtype):
  for name in ('f0', 'digits'):
    resolved = resolve.resolve(load(name), platform, 8)
    assert resolved.compute_dtype == dtype


def test_large_models_are_resolved_for_the_devices_that_are_here(monkeypatch):
  def microbatches(devices, memory=None):
    config = load('f4')
    config.batch_size = 32 * devices
    return steps.prepare_config(
      config, platform='tpu', devices=devices, memory=memory
    ).run.accumulate

  assert (microbatches(8), microbatches(1)) == (1, 2)
  assert microbatches(1, memory=32 * 2**30) == 1

  device = types.SimpleNamespace(
    memory_stats=lambda: {'bytes_limit': 32 * 2**30}
  )
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])
  config = load('f4')
  config.batch_size = 32
  assert steps.prepare_config(config, devices=1).run.accumulate == 1


@pytest.mark.parametrize(
  ('batch_size', 'shards'),
  [(4096, 128), (1000, 8), (256, 64), (64, 16), (34, 2), (6, 1), (2, 1)],
)
def test_shards_follow_the_batch(batch_size, shards):
  overridden = nfnet_configs.get_config()
  overridden.batch_size = batch_size
  resolved = steps.prepare_config(overridden, devices=1)
  assert resolved.data.shards == shards
  assert batch_size % shards == 0


@pytest.mark.parametrize('name', NAMES)
def test_the_table_has_the_accuracy_that_the_authors_report(name):
  line = nfnet_configs.CONFIGS[name]
  reported = registry.get_model_spec(f'nfnet_{name}').reported_top1
  if name == 'f6':  # Reported with SAM only.
    reported = None
  assert (f'{reported} % top-1' in line) == (reported is not None)
