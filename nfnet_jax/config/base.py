"""What a configuration holds, and what is checked of it by itself.

A run's configuration is a locked `ConfigDict`. Everything under `run` is
operational (cadences, places, and of a step its forms, parts and remat) and may
change when a run is resumed; all other keys make the experiment, and a run
refuses to resume with others. `derive` fills in what depends on other values;
`workdirs` keeps the result with a run.
"""

import dataclasses
import math
import os
import re

import ml_collections
from ml_collections import config_dict

from nfnet_jax import errors
from nfnet_jax.optim import clipping
from nfnet_jax.storage import files

_DURATION = re.compile(
  r'\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*(step|epoch|example)s?\s*'
)


def base() -> ml_collections.ConfigDict:
  """Returns the published ImageNet settings (arXiv 2102.06171, appendix A).

  None stands for a value that `derive` fills in, or for a part left out:
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
        'fast_convs': config_dict.placeholder(bool),
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
  'optimizer.clip_by': tuple(clipping.RULES),
  'data.crop': ('distorted', 'whole'),
  'data.partners': ('fresh', 'in_batch'),
  'data.eval_crop': ('squash', 'centre'),
}


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


def check_ranges(config: ml_collections.ConfigDict) -> None:
  """Checks the numbers that are given, before others are derived from them.

  Raises:
    errors.InputError: naming the setting and its range.
  """
  values = flat(config)
  for name, (least, limit) in _RANGES.items():
    value = values[name]
    if value is not None and not least <= value < limit:
      raise errors.InputError(f'{name} {value} is not in [{least}, {limit}).')


def check_values(config: ml_collections.ConfigDict) -> None:
  """Checks what else a resolved configuration may hold.

  Raises:
    errors.InputError: naming the setting and what it may be.
  """
  values = flat(config)
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


def absolute(path: str) -> str:
  """Returns a path that holds wherever a run is resumed."""
  return path if files.is_in_bucket(path) else os.path.abspath(path)


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
