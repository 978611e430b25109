"""Every family through the doors, and the configs of the comparisons."""

import csv
import json

import numpy as np
import pytest

from nfnet_jax import errors
from nfnet_jax.config import experiment as experiment_lib
from nfnet_jax.config import lookup
from nfnet_jax.experiments import evaluate, models, signal_propagation, train
from nfnet_jax.experiments.configs import (
  efficientnet,
  f0,
  ladder,
  nf_regnet,
  resnet,
)
from nfnet_jax.models import registry
from tests import trained_weights

slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
  ('name', 'flags'),
  [
    ('bn_resnet_pico', ['--config.model.cross_replica_bn=True']),
    slow('bn_resnet_pico', []),
    slow('nf_resnet_pico', ['--config.model.se_ratio=0.25']),
    slow('nf_regnet_pico', ['--config.optimizer.clip_by=layer']),
    slow('senet_pico', ['--config.optimizer.trust_coefficient=0.001']),
    slow('efficientnet_pico', ['--config.optimizer.rms_decay=0.9']),
    slow('nfnet_pico_bn', ['--config.optimizer.clip_by=global_norm']),
  ],
)
def test_family_trains_resumes_and_evaluates(
  run_command, small, tmp_path, name, flags
):
  flags = [*small, f'--config.model.name={name}', *flags]
  whole, parts = (f'--workdir={tmp_path / run}' for run in ('whole', 'parts'))
  code, out, err = run_command(train.main, *flags, whole, '--json')
  assert code == 0, err
  trained = json.loads(out)
  assert np.isfinite(trained['loss'])
  code, out, _ = run_command(evaluate.main, whole, '--json', on_a_run=True)
  evaluated = json.loads(out)
  assert 'top1' in evaluated
  assert evaluated.items() <= trained.items()
  # From the checkpoint of step 3 on, in a workdir that holds no more.
  (tmp_path / 'parts').mkdir()
  checkpoints = tmp_path / 'parts' / 'checkpoints'
  checkpoints.mkdir()
  (tmp_path / 'whole' / 'checkpoints' / '3').rename(checkpoints / '3')
  code, out, err = run_command(train.main, *flags, parts, '--json')
  assert (code, 'Resuming after step 3' in err) == (0, True)
  assert evaluated.items() <= json.loads(out).items()


def resolved(config):
  return experiment_lib.prepare_config(config)


def test_resnets():
  for name in ('nf_resnet50', 'bn_resnet200', 'resnet50', 'senet50'):
    config = resnet.get_config(name)
    config.batch_size = 256
    config = resolved(config)
    assert config.optimizer.learning_rate == 0.1
    assert config.data.randaugment_layers == 0
    assert not config.data.mixup
    assert config.optimizer.clipping == 0
    assert (config.data.image_size, config.data.eval_size) == (224, 224)
    assert config.data.eval_crop == 'centre'
    assert config.ema_decay == 0


def test_nf_regnets():
  for variant, size in (('b0', 192), ('b5', 384)):
    config = nf_regnet.get_config(variant)
    config.batch_size = 512
    config = resolved(config)
    assert config.optimizer.learning_rate == 0.4
    assert config.optimizer.final_learning_rate == 0.001
    assert config.data.image_size == size
    assert config.data.mixup
    assert config.data.randaugment_layers == 0


def test_efficientnets():
  config = efficientnet.get_config('b3')
  assert resolved(config).optimizer.learning_rate == 0.256
  config.batch_size = 2048
  config = resolved(config)
  assert config.optimizer.learning_rate == 0.128
  assert config.data.randaugment_layers == 2
  assert config.data.image_size == 300


@pytest.mark.parametrize('depth', ['f0', 'f3'])
def test_every_rung_of_the_ladder_is_reported(depth):
  for rung in ladder._RUNGS:
    config = resolved(ladder.get_config(f'{depth}_{rung}'))
    augmented = rung in ('randaugment', 'cutmix', 'default_width', 'bn')
    assert (config.data.randaugment_layers == 4) == augmented
    assert config.model.name.startswith(f'nfnet_{depth}')
    assert f'\n  {rung} ' in ladder.__doc__
  cutmix = resolved(ladder.get_config(f'{depth}_cutmix')).to_dict()
  published = f0.get_config()
  published.model.name = f'nfnet_{depth}'
  assert cutmix == resolved(published).to_dict()


@pytest.mark.parametrize('rung', ['f4_bn', 'f0', 'f0_relu'])
def test_unknown_rung_is_refused(rung):
  with pytest.raises(ValueError, match='is no rung'):
    ladder.get_config(rung)


def test_unknown_variant_is_refused():
  with pytest.raises(ValueError, match="'b9' is no variant"):
    nf_regnet.get_config('b9')


@pytest.mark.parametrize(
  ('name', 'setting', 'value'),
  [
    ('nfnet_f0', 'se_ratio', 0.25),
    ('nf_resnet50', 'cross_replica_bn', True),
    ('bn_resnet50', 'skip_gain', 1.0),
    ('efficientnet_b0', 'activation', 'relu'),
  ],
)
def test_option_that_a_family_lacks_is_refused(name, setting, value):
  config = f0.get_config()
  config.model.name = name
  config.model[setting] = value
  with pytest.raises(errors.InputError, match=f'model.{setting} is no option'):
    resolved(config)


def test_unknown_activation_is_refused():
  config = f0.get_config()
  config.model.activation = 'rellu'
  with pytest.raises(errors.InputError, match='rellu'):
    resolved(config)


def test_table_of_models_without_a_pattern_is_whole(run_command, monkeypatch):
  names = ['nfnet_pico', 'senet_pico']
  monkeypatch.setattr(registry, 'list_models', lambda: names)
  code, out, _ = run_command(models.main, takes='[PATTERN]')
  assert code == 0
  assert [line.split()[0] for line in out.splitlines()] == ['model', *names]


def test_table_of_models(run_command):
  code, out, _ = run_command(models.main, '*_pico', takes='[PATTERN]')
  assert code == 0
  lines = out.splitlines()
  assert lines[0].split()[:2] == ['model', 'parameters']
  assert len(lines) >= 6
  code, out, _ = run_command(
    models.main, 'resnet50', '--json', takes='[PATTERN]'
  )
  row = json.loads(out)['resnet50']
  assert row['parameters'] == 25_557_032
  assert row['reported_top1'] == 78.6
  assert row['macs'] == pytest.approx(4.09e9, rel=0.01)
  code, _, err = run_command(models.main, 'vgg*', takes='[PATTERN]')
  assert code == 2
  assert "No model matches 'vgg*'; known: nfnet_f0, " in err


def read_table(path):
  with path.open() as file:
    return list(csv.DictReader(file))


def test_signal_propagation(run_command, tmp_path):
  for name, expected in (
    ('nf_resnet_pico', [1.04, 1.04, 1.08, 1.04, 1.04]),
    ('bn_resnet_pico', [1.36, 1.36, 2.05, 1.36, 1.36]),
  ):
    code, out, err = run_command(
      signal_propagation.main,
      f'--model={name}',
      f'--out={tmp_path}/new',
      '--size=96',
    )
    assert code == 0, err
    paths = [f'{tmp_path}/new/{name}.{kind}' for kind in ('csv', 'png')]
    assert out.split() == paths
    rows = read_table(tmp_path / 'new' / f'{name}.csv')
    assert [round(float(row['expected_var']), 2) for row in rows] == expected
    # Few channels on small images: roughly.
    var = [float(row['var']) for row in rows]
    np.testing.assert_allclose(var, expected, rtol=0.35)


def test_signal_propagation_of_a_run_on_images(run_command, data_dir, tmp_path):
  _, weights = trained_weights.random_weights('nfnet_pico')
  trained_weights.write_run(tmp_path / 'run', weights)
  code, _, err = run_command(
    signal_propagation.main,
    f'--weights={tmp_path}/run',
    '--dataset=digits',
    f'--data_dir={data_dir}',
    f'--out={tmp_path}',
  )
  assert code == 0, err
  rows = read_table(tmp_path / 'nfnet_pico.csv')
  assert [row['block'] for row in rows] == ['0', '1', '2', '3']


@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    ([], '--model=NAME or --weights=PATH'),
    (['--model=nf_resnet51'], "Unknown model 'nf_resnet51'"),
    (['--model=nfnet_pico', '--dataset=no_such'], 'TFDS knows no dataset'),
  ],
)
def test_signal_propagation_of_nothing(run_command, flags, said, tmp_path):
  code, _, err = run_command(
    signal_propagation.main, *flags, f'--out={tmp_path}'
  )
  assert code == 2
  assert said in err


def test_a_table_is_whole_or_not_there(run_command, monkeypatch, tmp_path):
  rows = [{'block': 0}, {'no_column': 1}]
  monkeypatch.setattr(signal_propagation, 'measure', lambda *network: rows)
  with pytest.raises(ValueError, match='no_column'):
    run_command(
      signal_propagation.main, '--model=nfnet_pico', f'--out={tmp_path}'
    )
  assert not list(tmp_path.iterdir())


def test_signal_propagation_to_nowhere(run_command, monkeypatch):
  monkeypatch.delattr(signal_propagation, 'measure')  # The work.
  flags = '--model=nfnet_pico', '--out=/proc'
  code, out, err = run_command(signal_propagation.main, *flags)
  assert (code, out) == (2, '')
  assert err.startswith("nfnet_jax: --out='/proc': ")


def test_configs_are_listed():
  table = lookup.config_table()
  for name in ('resnet', 'nf_regnet', 'efficientnet', 'ladder', 'f7_plus'):
    assert f'\n{name} ' in f'\n{table}'
