import pytest

from nfnet_jax.config import base
from nfnet_jax.config import resolve as resolve_lib


def make_config(model='nfnet_f1'):
  config = base.get_config()
  config.model.name = model
  return config


def resolve(config):
  return resolve_lib.resolve(config, 'cpu', 8)


def test_derived_after_overrides():
  config = make_config()
  config.batch_size = 1024
  resolved = resolve(config)
  assert resolved.optimizer.learning_rate == pytest.approx(0.4)
  assert resolved.data.image_size == 224
  assert resolved.data.eval_size == 320
  assert resolved.run.eval_batch_size == 1024
  with pytest.raises(AttributeError, match='locked'):
    resolved.new_key = 1


GIB = 2**30


def step_of(model, per_device, devices, memory=None, **settings):
  """Return the number of microbatches, and whether blocks are recomputed."""
  config = make_config(model)
  config.batch_size = per_device * devices
  config.update_from_flattened_dict(settings)
  run = resolve_lib.resolve(config, 'tpu', devices, memory).run
  assert 'shard_update' in run.fast_paths or settings
  return run.accumulate, run.remat


@pytest.mark.parametrize(
  ('model', 'sharded', 'replicated'),
  [
    ('nfnet_f3', (1, False), (1, False)),
    ('nfnet_f4', (1, False), (2, False)),
    ('nfnet_f5', (2, False), (4, False)),
    ('nfnet_f6', (4, False), (1, True)),
    ('nfnet_f7', (4, False), (1, True)),
    ('nfnet_f4_plus', (2, False), (4, False)),
    ('nfnet_f5_plus', (4, False), (1, True)),
    ('nfnet_f6_plus', (1, True), (1, True)),
    ('nfnet_f7_plus', (1, True), (1, True)),
  ],
)
def test_how_32_images_fit_a_tpu_v3(model, sharded, replicated):
  assert step_of(model, 32, 8) == step_of(model, 32, 128) == sharded
  # Few devices do not save enough, and with SAM the update is not sharded.
  assert step_of(model, 32, 4) == replicated
  assert step_of(model, 32, 8, **{'optimizer.sam_rho': 0.05}) == replicated
  assert step_of(model, 32, 8, int(15.48 * GIB)) == sharded


@pytest.mark.parametrize(
  ('model', 'per_device', 'gib', 'expected'),
  [
    ('nfnet_f5', 32, 30.75, (1, False)),  # TPU v4.
    ('nfnet_f5', 64, 30.75, (2, False)),
    ('nfnet_f6', 32, 30.75, (2, False)),
    ('nfnet_f7', 32, 30.75, (2, False)),
    ('nfnet_f7', 32, 95.74, (1, False)),
    ('nfnet_f5', 64, 15.48, (4, False)),
    ('nfnet_f5', 24, 15.48, (2, False)),
    ('nfnet_f5', 34, 15.48, (2, True)),  # Not 17 of two images.
    ('nfnet_f7', 125, 15.48, (5, True)),  # Not 25 of five images.
    ('nfnet_f5', 40, 15.48, (4, False)),
    ('nfnet_f5', 16, 15.48, (1, False)),
    ('nfnet_f7', 8, 15.48, (1, False)),
    ('nfnet_f4', 32, 7.48, (4, False)),  # TPU v2.
    ('nfnet_f5', 32, 7.48, (4, True)),
    ('nfnet_f0', 1024, 7.48, (1, False)),
  ],
)
def test_microbatches_follow_the_memory(model, per_device, gib, expected):
  assert step_of(model, per_device, 8, int(gib * GIB)) == expected


def test_given_microbatches_and_recomputation_hold():
  given = {'run.accumulate': 8}
  assert step_of('nfnet_f5', 32, 8, **given) == (8, False)
  given = {'run.remat': True}
  assert step_of('nfnet_f5', 32, 8, **given) == (1, True)
  given = {'run.remat': False}
  assert step_of('nfnet_f7', 32, 4, **given) == (8, False)


def test_recomputed_blocks_of_a_large_batch_have_microbatches():
  assert step_of('nfnet_f6', 128, 4) == (4, True)
  assert step_of('nfnet_f5', 64, 8, **{'run.remat': True}) == (2, True)


def test_a_batch_that_is_smaller_than_the_devices():
  config = make_config('nfnet_f5')
  config.batch_size = 7
  assert resolve(config).run.accumulate == 1


def test_given_values_hold():
  config = make_config()
  config.optimizer.learning_rate = 0.5
  config.data.image_size = 160
  resolved = resolve(config)
  assert resolved.optimizer.learning_rate == 0.5
  assert resolved.data.image_size == 160
