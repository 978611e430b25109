import pytest

from nfnet_jax.config import base as config_lib
from nfnet_jax.config import resolve as resolve_lib
from nfnet_jax.models import registry


def resolve(config):
  return resolve_lib.resolve(
    config, registry.get_model_spec('nfnet_f1'), 'cpu', 8
  )


def test_derived_after_overrides():
  config = config_lib.base()
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
def test_large_models_take_gradients_in_parts(
  model, batch_size, platform, parts
):
  config = config_lib.base()
  config.batch_size = batch_size
  resolved = resolve_lib.resolve(
    config, registry.get_model_spec(model), platform, 8
  )
  assert resolved.run.accumulate == parts
  assert batch_size // resolved.data.shards % parts == 0
  assert not resolved.run.remat


def test_the_largest_compute_blocks_again():
  spec = registry.get_model_spec('nfnet_f6')
  assert resolve_lib.resolve(config_lib.base(), spec, 'cpu', 8).run.remat
  config = config_lib.base()
  config.run.remat = False
  assert not resolve_lib.resolve(config, spec, 'cpu', 8).run.remat
  config = config_lib.base()
  config.optimizer.sam_rho = 0.05  # Whose update cannot be sharded.
  assert resolve_lib.resolve(config, spec, 'tpu', 8).run.remat
  spec = registry.get_model_spec('nfnet_f7')
  assert resolve_lib.resolve(config_lib.base(), spec, 'tpu', 8).run.remat


@pytest.mark.parametrize(
  ('devices', 'parts', 'again'),
  [(1, [2, 4, 1], True), (4, [2, 4, 1], True), (8, [1, 2, 4], False)],
)
def test_few_devices_have_little_to_share(devices, parts, again):
  """The update spares memory where eight or more devices share it."""
  resolved = [
    resolve_lib.resolve(
      config_lib.base(), registry.get_model_spec(model), 'tpu', devices
    )
    for model in ('nfnet_f4', 'nfnet_f5', 'nfnet_f6')
  ]
  assert [config.run.accumulate for config in resolved] == parts
  assert resolved[2].run.remat is again
  assert all(config.run.shard_update for config in resolved)


@pytest.mark.parametrize(
  ('model', 'size', 'platform', 'fast'),
  [
    ('nfnet_f1', None, 'tpu', True),
    ('nfnet_f1', None, 'gpu', True),
    ('nfnet_f1', None, 'cpu', False),
    ('nfnet_f1', 226, 'tpu', False),
    ('nfnet_f1_bn', None, 'tpu', False),
    ('nf_resnet50', None, 'tpu', False),
  ],
)
def test_the_stem_is_fast_where_it_can_be(model, size, platform, fast):
  config, spec = config_lib.base(), registry.get_model_spec(model)
  config.data.image_size = size
  assert resolve_lib.resolve(config, spec, platform, 8).run.fast_stem is fast
  config.run.fast_stem = not fast
  assert (
    resolve_lib.resolve(config, spec, platform, 8).run.fast_stem is not fast
  )


@pytest.mark.parametrize(
  ('model', 'activation', 'platform', 'forms'),
  [
    ('nfnet_f1', None, 'tpu', {'fast_stem', 'fused_blocks'}),
    ('nfnet_f1', None, 'cpu', {'fused_blocks', 'fast_convs'}),
    ('nfnet_f1', 'log_softmax', 'tpu', set()),
    ('nfnet_f1', 'log_softmax', 'cpu', {'fast_convs'}),
    ('nf_resnet50', None, 'cpu', set()),
  ],
)
def test_forms_suit_the_platform(model, activation, platform, forms):
  config, spec = config_lib.base(), registry.get_model_spec(model)
  config.model.activation = activation
  run = resolve_lib.resolve(config, spec, platform, 8).run
  assert {form for form in resolve_lib.FORMS if run[form]} == forms


def test_given_values_hold():
  config = config_lib.base()
  config.optimizer.learning_rate = 0.5
  config.data.image_size = 160
  resolved = resolve(config)
  assert resolved.optimizer.learning_rate == 0.5
  assert resolved.data.image_size == 160
