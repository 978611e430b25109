"""Derived values: what a configuration leaves to its other values.

Nothing is refused here; `config.validate` looks at the result.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re

import ml_collections

from nfnet_jax import errors, preprocessing
from nfnet_jax.config import base, fast_paths
from nfnet_jax.models import registry
from nfnet_jax.optim import clipping
from nfnet_jax.storage import failures, files
from nfnet_jax.weights import download, load, network

# Data shards of a run that does not ask for a number: the cores of the pod on
# which the paper's batch of 4,096 was trained.
_MAX_SHARDS = 128

# A share of the training split as `data.eval_split`, and a whole split.
_SHARE = re.compile(r'([1-9]\d?)%')
_WHOLE_SPLIT = re.compile(r'[^\[\]+]+')

# The most images of a microbatch for each `_MEMORY` of a device. The key says
# whether the update is sharded over at least `_MIN_SHARDED` devices. Blocks are
# recomputed where fewer than `_MIN_IMAGES` fit, which costs less; then
# `_RECOMPUTED_IMAGES` fit. "+" variants without a sharded update were not
# planned. See experiments/plan_memory/.
_MEMORY = 15 * 2**30
_MIN_SHARDED = 8
_MIN_IMAGES = 8
_RECOMPUTED_IMAGES = 32
_IMAGES = {
  True: {
    'nfnet_f4': 32,
    'nfnet_f5': 16,
    'nfnet_f6': 8,
    'nfnet_f7': 8,
    'nfnet_f4_plus': 16,
    'nfnet_f5_plus': 8,
    'nfnet_f6_plus': 4,
    'nfnet_f7_plus': 4,
  },
  False: {
    'nfnet_f4': 16,
    'nfnet_f5': 8,
    'nfnet_f6': 4,
    'nfnet_f7': 4,
    'nfnet_f4_plus': 8,
    'nfnet_f5_plus': 4,
    'nfnet_f6_plus': 4,
    'nfnet_f7_plus': 4,
  },
}


def resolve(
  config: ml_collections.ConfigDict,
  platform: str,
  devices: int,
  memory: int | None = None,
) -> ml_collections.ConfigDict:
  """Return a configuration with all derived values, locked.

  Args:
    config: with overrides applied.
    platform: 'cpu', 'tpu' or another of JAX's.
    devices: number of all devices that train.
    memory: bytes of a device. Where they are unknown, those of a TPU v3.
  """
  config = config.copy_and_resolve_references()
  if config.compute_dtype == 'auto':
    config.compute_dtype = 'float32' if platform == 'cpu' else 'bfloat16'
  for section, key in ((config.run, 'data_dir'), (config, 'weights')):
    if section[key]:
      section[key] = absolute(section[key])
  hold_out(config.data)
  _resolve_optimizer(config)
  if config.model.name in registry.list_models():
    spec = registry.get_model_spec(config.model.name)
    _resolve_data(config, spec)
    _resolve_step(config, spec, platform, devices, memory)
  if config.run.eval_batch_size is None:
    config.run.eval_batch_size = config.batch_size
  return config.lock()


def hold_out(data: ml_collections.ConfigDict) -> None:
  """Cut a share of the training split off for evaluation, if it is asked for.

  With `eval_split` '10%' and `train_split` 'train', they become 'train[:10%]'
  and 'train[10%:]': the first images in the fixed order of the dataset. Others
  stay as they are.
  """
  share = _SHARE.fullmatch(data.eval_split)
  if share and _WHOLE_SPLIT.fullmatch(data.train_split):
    split = data.train_split
    data.eval_split = f'{split}[:{share[1]}%]'
    data.train_split = f'{split}[{share[1]}%:]'


def _resolve_optimizer(config: ml_collections.ConfigDict) -> None:
  optimizer = config.optimizer
  if optimizer.learning_rate is None:
    optimizer.learning_rate = optimizer.base_rate * config.batch_size / 256
  if optimizer.clipping is None and optimizer.clip_by in clipping.RULES:
    optimizer.clipping = clipping.RULES[optimizer.clip_by].default


def _resolve_data(
  config: ml_collections.ConfigDict, spec: registry.ModelSpec
) -> None:
  data = config.data
  if data.image_size is None:
    data.image_size = spec.train_size
  for name, value in dataclasses.asdict(spec.preprocessing).items():
    if data[f'eval_{name}'] is None:
      data[f'eval_{name}'] = value
  if data.randaugment_magnitude is None:
    data.randaugment_magnitude = spec.augment_magnitude
  if not data.randaugment_magnitude:  # The model has no published one.
    data.randaugment_layers = 0
  if data.shards is None:
    augmentation = base.read_fields(preprocessing.Augmentation, data)
    group = max(augmentation.examples_per_group, 1)
    # At least four examples each, for both kinds of mixing; a power of two.
    largest = config.batch_size // max(group, 4)
    largest = 1 << max(largest, 1).bit_length() - 1
    groups, rest = divmod(config.batch_size, group)
    # With a rest, validation says what the batch must be a multiple of.
    shared = math.gcd(config.batch_size if rest else groups, _MAX_SHARDS)
    data.shards = min(shared, largest)


def _resolve_step(
  config: ml_collections.ConfigDict,
  spec: registry.ModelSpec,
  platform: str,
  devices: int,
  memory: int | None,
) -> None:
  run = config.run
  if run.fast_paths == fast_paths.AUTO:
    run.fast_paths = fast_paths.choose(config, spec, platform)
  shards_update = fast_paths.SHARD_UPDATE in fast_paths.names(run.fast_paths)
  is_sharded = shards_update and devices >= _MIN_SHARDED
  batch = max(config.batch_size // devices, 1)
  images = _IMAGES[is_sharded].get(spec.name)
  count = 1
  if images:
    share = (memory or _MEMORY) / _MEMORY
    factor = math.floor(share) or share
    count = _fewest_microbatches(batch, images * factor)
    if run.remat is None:
      run.remat = batch // count < min(batch, _MIN_IMAGES)
    if run.remat:
      count = _fewest_microbatches(batch, _RECOMPUTED_IMAGES * factor)
  if run.remat is None:
    run.remat = False
  if run.accumulate is None:
    run.accumulate = count


def _fewest_microbatches(batch: int, images: float) -> int:
  """Return into how many a batch is cut so that each has few enough images."""
  counts = range(min(math.ceil(batch / images), batch), batch + 1)
  return next(count for count in counts if batch % count == 0)


@functools.lru_cache(maxsize=1)
def read_weights(path: str) -> network.Weights:
  """Read the weights that a run starts from, once.

  Raises:
    errors.InputError: if they cannot be used.
    errors.RunError: if they cannot be read now.
  """
  with failures.as_command_error(ValueError):
    return load.load_weights(path)


def set_model_from_weights(
  config: ml_collections.ConfigDict, weights: network.Weights
) -> ml_collections.ConfigDict:
  """Return a configuration whose model is the one of some weights.

  Evaluation preprocesses images as for the weights, too, where the
  configuration does not say otherwise.

  Raises:
    errors.InputError: if the configuration names another model.
  """
  config = config.copy_and_resolve_references()
  model = config.model
  if model.name not in (None, weights.model):
    raise errors.InputError(
      f"The weights are of '{weights.model}', not of '{model.name}'. Use "
      f'--config.model.name={weights.model}.'
    )
  model.name = weights.model
  for name, value in weights.options.items():
    if model[name] is None:
      model[name] = value
  for name, value in dataclasses.asdict(weights.preprocessing).items():
    if config.data[f'eval_{name}'] is None:
      config.data[f'eval_{name}'] = value
  return config


def absolute(path: str) -> str:
  """Return weights by a name that holds in every folder of a resumed run."""
  if files.is_in_bucket(path) or download.is_remote(path):
    return path
  return os.path.abspath(path)
