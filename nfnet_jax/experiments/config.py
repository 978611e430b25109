"""What a configuration holds, and what is derived from it after overrides.

A run's configuration is a locked `ConfigDict`. Everything under `run` is
operational (cadences, places, layout) and may change when a run is resumed; all
other keys make the experiment, and a run refuses to resume with others.
"""

from collections.abc import Sequence
import dataclasses
import json
import math
import os
import re

from etils import epath
import ml_collections
from ml_collections import config_dict

from nfnet_jax.experiments import errors
from nfnet_jax.models import fast_stem, registry
from nfnet_jax.optim import recipe
from nfnet_jax.training import files

_FILE = 'config.json'
_CLASSES = 'classes.txt'
_DURATION = re.compile(
  r'\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*(step|epoch|example)s?\s*'
)


def base() -> ml_collections.ConfigDict:
  """Returns the published ImageNet settings (arXiv 2102.06171, appendix A).

  None stands for a value that `resolve` derives, or for a part left out:
  `optimizer.decay_every` takes stairs in place of the cosine, `rms_decay` makes
  SGD RMSProp, and a model's options are its family's own. A `clipping` of 0
  leaves out AGC, a `sam_rho` of 0 sharpness-aware minimisation.
  """
  return ml_collections.ConfigDict(
    {
      'seed': 0,
      'dataset': 'imagenet2012',
      'weights': config_dict.placeholder(str),
      'batch_size': 4096,
      'train_for': '360 epochs',
      'compute_dtype': 'auto',
      'label_smoothing': 0.1,
      'ema_decay': 0.99999,
      'model': {
        'name': 'nfnet_f0',
        'stochdepth_rate': 0.25,
        'dropout_rate': config_dict.placeholder(float),
        'activation': config_dict.placeholder(str),
        'skip_gain': config_dict.placeholder(float),
        'se_ratio': config_dict.placeholder(float),
        'timm_forward': config_dict.placeholder(bool),
        'cross_replica_bn': False,
      },
      'optimizer': {
        'learning_rate': config_dict.placeholder(float),
        'base_rate': 0.1,
        'warmup': '5 epochs',
        'final_learning_rate': 0.0,
        'decay_every': config_dict.placeholder(str),
        'decay_factor': 0.97,
        'momentum': 0.9,
        'nesterov': True,
        'rms_decay': config_dict.placeholder(float),
        'weight_decay': 2e-5,
        'clipping': 0.01,
        'clip_by': 'unit',
        'trust_coefficient': config_dict.placeholder(float),
        'sam_rho': 0.0,
        'sam_share': 0.2,
      },
      'data': {
        'train_split': 'train',
        'eval_split': 'validation',
        'image_size': config_dict.placeholder(int),
        'crop': 'distorted',
        'flip': True,
        'shift': 0,
        'mixup': True,
        'cutmix': True,
        'partners': 'fresh',
        'randaugment_layers': 4,
        'randaugment_magnitude': config_dict.placeholder(int),
        'eval_size': config_dict.placeholder(int),
        'eval_crop': config_dict.placeholder(str),
        'eval_margin': 32,
        'shards': config_dict.placeholder(int),
        'shuffle_buffer': 65_536,
      },
      'run': {
        'data_dir': config_dict.placeholder(str),
        'max_bad_records': 0,
        'eval_batch_size': config_dict.placeholder(int),
        'log_every': '100 steps',
        'eval_every': '5 epochs',
        'checkpoint_every': '1 epoch',
        'keep_checkpoints': 3,
        'remat': config_dict.placeholder(bool),
        'accumulate': config_dict.placeholder(int),
        'shard_update': config_dict.placeholder(bool),
        'fast_stem': config_dict.placeholder(bool),
        'fused_blocks': config_dict.placeholder(bool),
      },
    }
  ).lock()


@dataclasses.dataclass(frozen=True)
class Units:
  """Translates durations to steps.

  Example:
    >>> Units(batch_size=4096, examples=1_281_167).steps('5 epochs')
    1563.924560546875
  """

  batch_size: int
  examples: int

  def steps(self, duration: str) -> float:
    """Reads '100 steps', '5 epochs' or '1e6 examples' as a number of steps.

    Raises:
      errors.InputError: if it is not such a duration.
    """
    match = _DURATION.fullmatch(str(duration))
    if not match:
      raise errors.InputError(
        f"'{duration}' is not a duration; write '100 steps', '5 epochs' or "
        "'1e6 examples'."
      )
    amount, unit = float(match[1]), match[2]
    in_examples = {
      'step': self.batch_size,
      'epoch': self.examples,
      'example': 1,
    }
    return amount * in_examples[unit] / self.batch_size


# Setting -> smallest value, and the value that it must stay below.
_RANGES = {
  'seed': (0, 2**31),
  'batch_size': (1, math.inf),
  'label_smoothing': (0, 1),
  'ema_decay': (0, 1),
  'model.stochdepth_rate': (0, 1),
  'model.dropout_rate': (0, 1),
  'model.se_ratio': (0, math.inf),
  'optimizer.learning_rate': (0, math.inf),
  'optimizer.final_learning_rate': (0, math.inf),
  'optimizer.decay_factor': (0, 1),
  'optimizer.base_rate': (0, math.inf),
  'optimizer.momentum': (0, 1),
  'optimizer.rms_decay': (0, 1),
  'optimizer.weight_decay': (0, math.inf),
  'optimizer.clipping': (0, math.inf),
  'optimizer.trust_coefficient': (0, math.inf),
  'optimizer.sam_rho': (0, math.inf),
  'data.image_size': (1, math.inf),
  'data.eval_size': (1, math.inf),
  'data.eval_margin': (0, math.inf),
  'data.shuffle_buffer': (1, math.inf),
  'data.shift': (0, math.inf),
  'data.randaugment_layers': (0, math.inf),
  'data.randaugment_magnitude': (0, 31),
  'data.shards': (1, math.inf),
  'run.max_bad_records': (0, math.inf),
  'run.eval_batch_size': (1, math.inf),
  'run.keep_checkpoints': (1, math.inf),
  'run.accumulate': (1, math.inf),
}
_CHOICES = {
  'compute_dtype': ('float32', 'bfloat16'),
  'optimizer.clip_by': recipe.CLIP_BY,
  'data.crop': ('distorted', 'whole'),
  'data.partners': ('fresh', 'in_batch'),
  'data.eval_crop': ('squash', 'centre'),
}

# Data shards of a run where none are asked for: the cores of the pod that the
# paper's batch of 4,096 was trained on.
_MOST_SHARDS = 128

# How 32 images a core fit the 16 GiB of a TPU v3's: in parts of eight or more,
# or else by computing blocks again. Whether the update is sharded, over eight
# cores or more, -> the parts and what computes again; see
# experiments/plan_memory/.
_PARTS = {
  True: {'nfnet_f5': 2, 'nfnet_f6': 4},
  False: {'nfnet_f4': 2, 'nfnet_f5': 4},
}
_REMAT = {True: ('nfnet_f7',), False: ('nfnet_f6', 'nfnet_f7')}

# Settings of `run` that choose a faster form of the network; see `models`.
FORMS = ('fast_stem', 'fused_blocks')


def check_keys(config: ml_collections.ConfigDict) -> None:
  """Checks that a configuration has the keys of `base` and no others.

  Raises:
    errors.InputError: naming those too many or too few.
  """
  wrong = set(flat(base())) ^ set(flat(config))
  if wrong:
    raise errors.InputError(
      f'The config has keys too many or too few: {", ".join(sorted(wrong))}. '
      'Start from the configuration of another experiment.'
    )


def check_values(config: ml_collections.ConfigDict) -> None:
  """Checks each setting by itself.

  Raises:
    errors.InputError: naming the setting and what it may be.
  """
  values = flat(config)
  for name, (least, limit) in _RANGES.items():
    value = values[name]
    if value is not None and not least <= value < limit:
      raise errors.InputError(f'{name} {value} is not in [{least}, {limit}).')
  if not 0 < config.optimizer.sam_share <= 1:
    raise errors.InputError(
      f'optimizer.sam_share {config.optimizer.sam_share} is not in (0, 1].'
    )
  if config.data.shift > config.data.image_size:
    raise errors.InputError(
      f'data.shift {config.data.shift} is more than the image of '
      f'{config.data.image_size} pixels.'
    )
  for name, choices in _CHOICES.items():
    if values[name] not in choices:
      raise errors.InputError(
        f"{name} '{values[name]}' is none of {', '.join(choices)}."
      )


def check_divides(
  name: str, value: int, divisor_name: str, divisor: int
) -> None:
  """Checks that a setting is a positive multiple of something.

  Raises:
    errors.InputError: with the arithmetic and the nearest values that work.
  """
  if value > 0 and value % divisor == 0:
    return
  below = value // divisor * divisor
  near = [size for size in (below, below + divisor) if size > 0]
  flags = ' or '.join(f'--config.{name}={size}' for size in near)
  raise errors.InputError(
    f'{name} {value} is not a positive multiple of {divisor_name} {divisor} '
    f'({value} = {value // divisor} x {divisor} + {value % divisor}). '
    f'Use {flags or f"--config.{name}={divisor}"}.'
  )


def resolve(
  config: ml_collections.ConfigDict, spec: registry.ModelSpec, platform: str
) -> ml_collections.ConfigDict:
  """Fills in what depends on other values, and locks the result.

  Args:
    config: with overrides applied.
    spec: the model's native sizes, crop and RandAugment magnitude.
    platform: 'cpu', 'tpu' or another of JAX's, on which 'auto' dtypes and the
      form of the stem depend.
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
      section[key] = _absolute(section[key])
  if run.shard_update is None:
    run.shard_update = platform != 'cpu' and not unshardable(config)
  if run.remat is None:
    run.remat = spec.name in _REMAT[run.shard_update]
  if run.accumulate is None:
    # Never more than divides the examples of a device, however many there are.
    parts = _PARTS[run.shard_update].get(spec.name, 1)
    run.accumulate = math.gcd(parts, config.batch_size // data.shards)
  if run.fast_stem is None:
    # CPUs have no lanes to fill: there it is a little slower, if anything.
    fits = 'fast_stem' in spec.options and not data.image_size % fast_stem.BLOCK
    run.fast_stem = fits and platform != 'cpu'
  if run.fused_blocks is None:
    run.fused_blocks = platform != 'cpu' and 'fused_blocks' in spec.options
  if run.eval_batch_size is None:
    run.eval_batch_size = config.batch_size
  return config.lock()


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


def save(
  config: ml_collections.ConfigDict,
  workdir: os.PathLike,
  class_names: Sequence[str],
) -> None:
  """Writes `WORKDIR/config.json`, and the classes' names to `classes.txt`.

  Raises:
    errors.InputError: if the workdir can never be written.
    errors.RunError: if it cannot be written now, for want of space perhaps.
  """
  workdir = epath.Path(workdir)
  text = json.dumps(config.to_dict(), indent=2) + '\n'
  with errors.of_storage():
    with files.as_os_error(f'Making {workdir}'):
      workdir.mkdir(parents=True, exist_ok=True)
    files.write_atomically(workdir / _CLASSES, '\n'.join(class_names) + '\n')
    files.write_atomically(workdir / _FILE, text)


def is_run(workdir: os.PathLike) -> bool:
  """Whether a workdir holds a run, as far as this process sees.

  Raises:
    errors.InputError: if it can never be read.
    errors.RunError: if it cannot be read now.
  """
  path = epath.Path(workdir) / _FILE
  with errors.of_storage(), files.as_os_error(f'Reading {path}'):
    return path.exists()


def load(workdir: os.PathLike) -> ml_collections.ConfigDict:
  """Reads the configuration that a workdir was made with.

  Raises:
    errors.InputError: if there is none, or it can never be read.
    errors.RunError: if it cannot be read now.
  """
  if not is_run(workdir):
    raise errors.InputError(
      f"'{workdir}' holds no run: there is no {_FILE} in it."
    )
  path, config = epath.Path(workdir) / _FILE, base()
  with errors.of_storage(), files.as_os_error(f'Reading {path}'):
    text = path.read_text()
  with errors.as_input_error(KeyError):
    config.update(json.loads(text))
  return config


def load_begun(
  workdir: os.PathLike, weights: str
) -> ml_collections.ConfigDict | None:
  """Reads the configuration of a run that began with these weights, if any."""
  if not is_run(workdir):
    return None
  config = load(workdir)
  return config if config.weights == _absolute(weights) else None


def check_same(config: ml_collections.ConfigDict, workdir: os.PathLike) -> None:
  """Checks that a workdir holds no other experiment than this one.

  Raises:
    errors.InputError: with the keys that differ.
  """
  if not is_run(workdir):
    return
  before, now = flat(load(workdir)), flat(config)
  differing = [
    f'{key}: {before.get(key)} there, {now.get(key)} here'
    for key in sorted(before.keys() | now.keys())
    if not key.startswith('run.') and before.get(key) != now.get(key)
  ]
  if differing:
    raise errors.InputError(
      f"'{workdir}' holds another experiment ({'; '.join(differing)}). Use "
      'another --workdir, or the same settings.'
    )


def _absolute(path: str) -> str:
  return path if '://' in path else os.path.abspath(path)


def flat(config: ml_collections.ConfigDict) -> dict[str, object]:
  """Lists a configuration's values under dotted names."""
  return _flat(config.to_dict())


def _flat(tree: dict, prefix: str = '') -> dict[str, object]:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= _flat(value, f'{prefix}{key}.')
    else:
      flat[prefix + key] = value
  return flat
