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


@pytest.mark.parametrize(
  ('model', 'batch_size', 'platform', 'parts'),
  [
    ('nfnet_f3', 4096, 'cpu', 1),
    ('nfnet_f4', 4096, 'cpu', 2),
    ('nfnet_f4', 4096, 'tpu', 1),
    ('nfnet_f5', 4096, 'cpu', 4),
    ('nfnet_f5', 4096, 'tpu', 2),
    ('nfnet_f6', 4096, 'tpu', 4),
    ('nfnet_f5', 24, 'cpu', 2),  # Four shards of six images.
    ('nfnet_f5', 7, 'cpu', 1),
  ],
)
def test_large_models_use_microbatches(model, batch_size, platform, parts):
  config = make_config(model)
  config.batch_size = batch_size
  resolved = resolve_lib.resolve(config, platform, 8)
  assert resolved.run.accumulate == parts
  assert batch_size // resolved.data.shards % parts == 0
  assert not resolved.run.remat


def test_the_largest_models_recompute_blocks():
  def remat(model, platform, **settings):
    config = make_config(model)
    config.update_from_flattened_dict(settings)
    return resolve_lib.resolve(config, platform, 8).run.remat

  assert remat('nfnet_f6', 'cpu')
  assert not remat('nfnet_f6', 'cpu', **{'run.remat': False})
  assert not remat('nfnet_f6', 'tpu')
  # With SAM the update cannot be sharded.
  assert remat('nfnet_f6', 'tpu', **{'optimizer.sam_rho': 0.05})
  assert remat('nfnet_f7', 'tpu')


@pytest.mark.parametrize(
  ('devices', 'parts', 'again'),
  [(1, [2, 4, 1], True), (4, [2, 4, 1], True), (8, [1, 2, 4], False)],
)
def test_the_sharded_update_saves_memory_from_eight_devices_on(
  devices, parts, again
):
  resolved = [
    resolve_lib.resolve(make_config(model), 'tpu', devices)
    for model in ('nfnet_f4', 'nfnet_f5', 'nfnet_f6')
  ]
  assert [config.run.accumulate for config in resolved] == parts
  assert resolved[2].run.remat is again
  assert all('shard_update' in config.run.fast_paths for config in resolved)


def test_given_values_hold():
  config = make_config()
  config.optimizer.learning_rate = 0.5
  config.data.image_size = 160
  resolved = resolve(config)
  assert resolved.optimizer.learning_rate == 0.5
  assert resolved.data.image_size == 160
