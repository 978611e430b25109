"""What of a configuration is derived from its other values."""

import math

import ml_collections

from nfnet_jax.config import base as config_lib
from nfnet_jax.models import layers, registry
from nfnet_jax.models.fast import stem

# Data shards of a run where none are asked for: the cores of the pod that the
# paper's batch of 4,096 was trained on.
_MOST_SHARDS = 128

# How 32 images a core fit the 16 GiB of a TPU v3's: in parts of eight or more,
# or else by computing blocks again. Whether so many devices or more share the
# update -> the parts and what computes again; see experiments/plan_memory/.
_SHARING = 8
_PARTS = {
  True: {'nfnet_f5': 2, 'nfnet_f6': 4},
  False: {'nfnet_f4': 2, 'nfnet_f5': 4},
}
_REMAT = {True: ('nfnet_f7',), False: ('nfnet_f6', 'nfnet_f7')}

# Settings of `run` that choose a faster form of the network; see `models`.
FORMS = ('fast_stem', 'fused_blocks', 'fast_convs')


def resolve(
  config: ml_collections.ConfigDict,
  spec: registry.ModelSpec,
  platform: str,
  devices: int,
) -> ml_collections.ConfigDict:
  """Fills in what depends on other values, and locks the result.

  Args:
    config: with overrides applied.
    spec: the model's native sizes, crop and RandAugment magnitude.
    platform: 'cpu', 'tpu' or another of JAX's, on which 'auto' dtypes and the
      forms of the step depend.
    devices: how many of all processes train, on which it depends what of a step
      must be saved.
  """
  config = config.copy_and_resolve_references()
  optimizer, data, run = config.optimizer, config.data, config.run
  if config.compute_dtype == 'auto':
    config.compute_dtype = 'float32' if platform == 'cpu' else 'bfloat16'
  if optimizer.learning_rate is None:
    optimizer.learning_rate = optimizer.base_rate * config.batch_size / 256
  if data.image_size is None:
    data.image_size = spec.train_size
  if data.eval_size is None:
    data.eval_size = spec.test_size
  if data.eval_crop is None:
    data.eval_crop = spec.eval_crop
  if data.randaugment_magnitude is None:
    data.randaugment_magnitude = spec.augment_magnitude
  if not data.randaugment_magnitude:  # A model that has no published one.
    data.randaugment_layers = 0
  if data.shards is None:
    # Parts of four or more, for both kinds of mixing; a power of two.
    most = 1 << max(config.batch_size // 4, 1).bit_length() - 1
    data.shards = min(math.gcd(config.batch_size, _MOST_SHARDS), most)
  for section, key in ((run, 'data_dir'), (config, 'weights')):
    if section[key]:
      section[key] = config_lib.absolute(section[key])
  if run.shard_update is None:
    run.shard_update = platform != 'cpu' and not unshardable(config)
  spared = run.shard_update and devices >= _SHARING
  if run.remat is None:
    run.remat = spec.name in _REMAT[spared]
  if run.accumulate is None:
    # Never more than divides the examples of a device, however many there are.
    parts = _PARTS[spared].get(spec.name, 1)
    run.accumulate = math.gcd(parts, config.batch_size // data.shards)
  _choose_forms(config, spec, platform)
  if run.eval_batch_size is None:
    run.eval_batch_size = config.batch_size
  return config.lock()


def _choose_forms(
  config: ml_collections.ConfigDict, spec: registry.ModelSpec, platform: str
) -> None:
  """Decides on the forms of the network that nobody has decided on."""
  is_cpu = platform == 'cpu'
  pays = {
    # CPUs have no lanes to fill: there it is slower.
    'fast_stem': not is_cpu and not config.data.image_size % stem.BLOCK,
    'fused_blocks': True,
    'fast_convs': is_cpu,
  }
  for form in FORMS:
    if config.run[form] is None:
      can_be = form in spec.fast_paths and not unformable(config, form)
      config.run[form] = can_be and pays[form]


def unformable(config: ml_collections.ConfigDict, form: str) -> bool:
  """Whether the network's activation leaves it no such form."""
  across = config.model.activation in layers.ACROSS_CHANNELS
  return across and form != 'fast_convs'


def unshardable(config: ml_collections.ConfigDict) -> str:
  """Names the setting for which the update cannot be sharded, if any."""
  optimizer = config.optimizer
  needs = {
    'optimizer.sam_rho': optimizer.sam_rho,
    'optimizer.trust_coefficient': optimizer.trust_coefficient is not None,
    'optimizer.clip_by': optimizer.clipping and optimizer.clip_by != 'unit',
    'model.timm_forward': config.model.timm_forward,
  }
  return next((name for name, needed in needs.items() if needed), '')
