import pytest

from nfnet_jax.config import base, fast_paths, resolve


def resolved(platform, **settings):
  config = base.get_config()
  config.update_from_flattened_dict({'model.name': 'nfnet_f1', **settings})
  return resolve.resolve(config, platform, 8).run.fast_paths


@pytest.mark.parametrize(
  ('settings', 'platform', 'expected'),
  [
    ({}, 'tpu', 'fast_stem,fused_blocks,shard_update'),
    ({}, 'cpu', 'fused_blocks,fast_convs'),
    ({'data.image_size': 226}, 'tpu', 'fused_blocks,shard_update'),
    ({'model.activation': 'log_softmax'}, 'tpu', 'shard_update'),
    ({'model.activation': 'log_softmax'}, 'cpu', 'fast_convs'),
    ({'model.name': 'nf_resnet50'}, 'tpu', 'shard_update'),
    ({'model.name': 'nf_resnet50'}, 'cpu', 'none'),
    ({'model.name': 'eca_nfnet_l0'}, 'tpu', 'none'),
    ({'model.name': 'eca_nfnet_l0'}, 'cpu', 'fast_convs'),
    ({'model.name': 'nfnet_f1_bn'}, 'tpu', 'shard_update'),
    ({'model.name': 'efficientnet_b0'}, 'cpu', 'fast_convs'),
    ({'optimizer.sam_rho': 0.05}, 'tpu', 'fast_stem,fused_blocks'),
    ({'optimizer.clip_by': 'layer'}, 'tpu', 'fast_stem,fused_blocks'),
    (
      {'optimizer.clip_by': 'layer', 'optimizer.clipping': 0.0},
      'tpu',
      'fast_stem,fused_blocks,shard_update',
    ),
  ],
)
def test_auto_takes_what_pays_and_can_be_used(settings, platform, expected):
  assert resolved(platform, **settings) == expected


@pytest.mark.parametrize('given', ['none', 'fast_stem', 'fast_convs,fast_stem'])
def test_given_paths_are_kept(given):
  assert resolved('cpu', **{'run.fast_paths': given}) == given


def test_names_are_those_of_the_table():
  every = ','.join(fast_paths.FAST_PATHS)
  assert fast_paths.names(every) == tuple(fast_paths.FAST_PATHS)
  assert fast_paths.names(' fast_stem, ,fused_blocks') == (
    'fast_stem',
    'fused_blocks',
  )
