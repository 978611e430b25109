"""Fast paths: faster ways to compute a training step.

Each gives the same values and gradients as the plain step, summed in another
order. The setting `run.fast_paths` chooses them: `auto` takes those that pay on
the platform and can be used, `none` takes none, and names, separated by commas,
take exactly those.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import ml_collections

from nfnet_jax.models import layers, registry
from nfnet_jax.models.fast import stem

AUTO, NONE = 'auto', 'none'

# (config, spec) -> why a fast path cannot be used, or '' if it can.
Conflict = Callable[[ml_collections.ConfigDict, registry.ModelSpec], str]


@dataclasses.dataclass(frozen=True)
class FastPath:
  """One fast path.

  Attributes:
    title: what summaries and plans call it.
    platforms: where it pays.
    conflict: why it cannot be used with a configuration.
  """

  title: str
  platforms: tuple[str, ...]
  conflict: Conflict


def _channel_conflict(
  config: ml_collections.ConfigDict, spec: registry.ModelSpec
) -> str:
  activation = config.model.activation
  if activation in layers.ACROSS_CHANNELS:
    return (
      f"keeps channels in another order, and model.activation '{activation}' "
      'works across channels'
    )
  return ''


def _stem_conflict(
  config: ml_collections.ConfigDict, spec: registry.ModelSpec
) -> str:
  size = config.data.image_size
  if not size or size % stem.BLOCK == 0:
    return _channel_conflict(config, spec)
  below = size // stem.BLOCK * stem.BLOCK
  near = [str(side) for side in (below, below + stem.BLOCK) if side]
  return (
    f'needs a data.image_size that is a multiple of {stem.BLOCK}, such as '
    f'{" or ".join(near)}, not {size}'
  )


def _no_conflict(
  config: ml_collections.ConfigDict, spec: registry.ModelSpec
) -> str:
  return ''


def _sharding_conflict(
  config: ml_collections.ConfigDict, spec: registry.ModelSpec
) -> str:
  optimizer = config.optimizer
  needs_all = {
    'optimizer.sam_rho': bool(optimizer.sam_rho),
    'optimizer.trust_coefficient': optimizer.trust_coefficient is not None,
    'optimizer.clip_by': optimizer.clipping != 0
    and optimizer.clip_by != 'unit',
    'model.timm_forward': bool(config.model.timm_forward),
  }
  for name, needed in needs_all.items():
    if needed:
      return f'divides parameters among devices, and {name} needs all of them'
  if not spec.family.standardizes_as_published:
    return f'standardises kernels as NFNets do, and {spec.name} does not'
  return ''


FAST_PATHS = {
  'fast_stem': FastPath(
    # NFNets compute the stem on blocks of 4 x 4 pixels, in which the input
    # pipeline delivers images. CPUs have no matrix units to fill: the stem
    # would be slower.
    'fast stem',
    ('tpu', 'gpu'),
    _stem_conflict,
  ),
  'fused_blocks': FastPath(
    # Blocks of NFNets pass over their activations fewer times.
    'fused blocks',
    ('tpu', 'gpu', 'cpu'),
    _channel_conflict,
  ),
  'fast_convs': FastPath(
    # Each group of a convolution is computed separately, depthwise ones are
    # sums of shifted images, and 1 x 1 convolutions are matrix products.
    'fast convolutions',
    ('cpu',),
    _no_conflict,
  ),
  'shard_update': FastPath(
    # Each device stores, standardises and updates a part of the large kernels.
    'sharded update',
    ('tpu', 'gpu'),
    _sharding_conflict,
  ),
}
# The one that does not concern the model.
SHARD_UPDATE = 'shard_update'


def conflict(
  name: str, config: ml_collections.ConfigDict, spec: registry.ModelSpec
) -> str:
  """Return why a configuration cannot use a fast path, '' if it can.

  Args:
    name: a key of `FAST_PATHS`.
    config: with its derived values.
    spec: the model.
  """
  if name != SHARD_UPDATE and name not in spec.fast_paths:
    return f"is for other models; '{spec.name}' has no such path"
  return FAST_PATHS[name].conflict(config, spec)


def choose(
  config: ml_collections.ConfigDict, spec: registry.ModelSpec, platform: str
) -> str:
  """Return the setting for `auto`: the paths that pay and can be used."""
  kind = platform if platform in ('tpu', 'cpu') else 'gpu'
  names = [
    name
    for name, path in FAST_PATHS.items()
    if kind in path.platforms and not conflict(name, config, spec)
  ]
  return join(names)


def names(setting: str) -> tuple[str, ...]:
  """Return the names in a setting that is not `auto`.

  Examples:
    >>> names('fast_stem,fused_blocks')
    ('fast_stem', 'fused_blocks')
    >>> names('none')
    ()
  """
  if setting == NONE:
    return ()
  return tuple(filter(None, map(str.strip, setting.split(','))))


def join(chosen: list[str]) -> str:
  """Return the setting that chooses these paths."""
  return ','.join(chosen) or NONE


def titles(setting: str) -> dict[str, str]:
  """Return the chosen paths' names and titles."""
  return {name: FAST_PATHS[name].title for name in names(setting)}
