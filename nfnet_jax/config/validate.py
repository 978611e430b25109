"""Every rule that a configuration must follow.

Each rule raises `errors.InputError` with one line: what is wrong, and what to
do. Nothing is computed and no data is touched before all rules are checked.
"""

from __future__ import annotations

from typing import Any

import ml_collections

from nfnet_jax import errors, preprocessing
from nfnet_jax.config import base, durations, fast_paths
from nfnet_jax.models import layers, registry

_DURATIONS = (
  'train_for',
  'optimizer.warmup',
  'optimizer.decay_every',
  'run.log_every',
  'run.eval_every',
  'run.checkpoint_every',
)


def validate(
  config: ml_collections.ConfigDict, devices: int | None = None
) -> None:
  """Check a resolved configuration.

  Args:
    config: see `config.resolve`.
    devices: number of devices that train; None if none does.

  Raises:
    errors.InputError: naming the setting, and what to do.
  """
  check_dataset(config)
  _check_model_name(config)
  values = base.flat(config)
  for name, setting in base.settings().items():
    _check_value(name, values[name], setting)
  _check_durations(values)
  spec = registry.get_model_spec(config.model.name)
  _check_model_options(config, spec)
  _check_shift(config)
  _check_hold_out(config)
  _check_fast_paths(config, spec)
  if devices is not None:
    _check_layout(config, devices)
    _check_microbatches(config, spec, devices)


def check_keys(config: ml_collections.ConfigDict) -> None:
  """Check that a configuration has exactly the settings of `base`.

  Raises:
    errors.InputError: naming those that are missing or unknown.
  """
  if not isinstance(config, ml_collections.ConfigDict):
    raise errors.InputError(
      'get_config() of the config file must return a ConfigDict, such as that '
      f'of nfnet_jax.config.base, not {type(config).__name__}.'
    )
  wrong = set(base.settings()) ^ set(base.flat(config))
  if wrong:
    raise errors.InputError(
      f'The config has missing or unknown settings: {", ".join(sorted(wrong))}.'
      ' Start from the configuration of another experiment.'
    )


def check_dataset(config: ml_collections.ConfigDict) -> None:
  """Check that a configuration names a dataset.

  Raises:
    errors.InputError: if it does not.
  """
  if config.dataset is None:
    raise errors.InputError('Name a dataset: --config.dataset=NAME.')


def _check_model_name(config: ml_collections.ConfigDict) -> None:
  if config.model.name is None:
    raise errors.InputError(
      'Name a model: --config.model.name=NAME, or a trained one: '
      '--config.weights=PATH.'
    )
  with errors.as_input_error():
    registry.get_model_spec(config.model.name)


def _check_value(name: str, value: Any, setting: base.Setting) -> None:
  if value is None:
    return
  if setting.interval and not in_interval(value, setting.interval):
    raise errors.InputError(f'{name} {value} is not in {setting.interval}.')
  if setting.choices and value not in setting.choices:
    raise errors.InputError(
      f"{name} '{value}' is none of {', '.join(setting.choices)}."
      f'{errors.did_you_mean(str(value), setting.choices)}'
    )


def in_interval(value: float, interval: str) -> bool:
  """Return whether a number lies in an interval.

  Examples:
    >>> in_interval(1, '(0, 1]'), in_interval(1, '[0, 1)')
    (True, False)
  """
  low, high = (float(end) for end in interval[1:-1].split(','))
  is_above = low <= value if interval[0] == '[' else low < value
  is_below = value <= high if interval[-1] == ']' else value < high
  return is_above and is_below


def _check_durations(values: dict[str, Any]) -> None:
  for name in _DURATIONS:
    if values[name] is not None:
      try:
        durations.parse(values[name])
      except ValueError as error:
        raise errors.InputError(f'{name}: {error}') from error


def _check_model_options(
  config: ml_collections.ConfigDict, spec: registry.ModelSpec
) -> None:
  for name, value in config.model.items():
    if value is not None and name != 'name' and name not in spec.options:
      raise errors.InputError(
        f"model.{name} is not an option of '{spec.name}'. Leave it out."
      )
  if config.model.activation is not None:
    with errors.as_input_error():
      layers.scaled_activation(config.model.activation)


def _check_shift(config: ml_collections.ConfigDict) -> None:
  data = config.data
  if data.shift > data.image_size:
    raise errors.InputError(
      f'data.shift {data.shift} is more than the image size of '
      f'{data.image_size} pixels.'
    )


def _check_hold_out(config: ml_collections.ConfigDict) -> None:
  """Check that a share to hold out could be cut off; see `resolve.hold_out`."""
  split, train_split = config.data.eval_split, config.data.train_split
  if not split.endswith('%'):
    return
  if '[' in train_split or '+' in train_split:
    raise errors.InputError(
      f"data.eval_split '{split}' is held out from a whole split, not from "
      f"'{train_split}'. Give both as slices, such as "
      "--config.data.train_split='train[10%:]' "
      "--config.data.eval_split='train[:10%]'."
    )
  raise errors.InputError(
    f"data.eval_split '{split}' is not a share from 1% to 99%. Use "
    '--config.data.eval_split=10%.'
  )


def _check_fast_paths(
  config: ml_collections.ConfigDict, spec: registry.ModelSpec
) -> None:
  known = list(fast_paths.FAST_PATHS)
  for name in fast_paths.names(config.run.fast_paths):
    if name in (fast_paths.AUTO, fast_paths.NONE):
      raise errors.InputError(
        f"run.fast_paths: '{name}' stands alone. Leave the other names out."
      )
    if name not in known:
      raise errors.InputError(
        f"run.fast_paths has no path '{name}'."
        f'{errors.did_you_mean(name, known)} Known: {fast_paths.AUTO}, '
        f'{fast_paths.NONE}, {", ".join(known)}.'
      )
    if reason := fast_paths.conflict(name, config, spec):
      raise errors.InputError(
        f'run.fast_paths: {name} {reason}. Leave {name} out.'
      )


def _check_layout(config: ml_collections.ConfigDict, devices: int) -> None:
  shards = config.data.shards
  check_divides('data.shards', shards, 'the number of devices', devices)
  augmentation = base.read_fields(preprocessing.Augmentation, config.data)
  count, name = augmentation.examples_per_group, 'data.shards'
  if augmentation.examples_per_copy > 1:
    name = f'twice {name}'
  if augmentation.multiplicity > 1:
    if augmentation.jpeg_scaling:
      raise errors.InputError(
        'data.jpeg_scaling needs data.multiplicity=1, because the examples of '
        'an image have different crops. Leave one of the two out.'
      )
    name = f'{name} times data.multiplicity'
  check_divides('batch_size', config.batch_size, name, count * shards)


def _check_microbatches(
  config: ml_collections.ConfigDict, spec: registry.ModelSpec, devices: int
) -> None:
  count = config.run.accumulate
  if count == 1:
    return
  divisor = 'the number of devices times run.accumulate'
  check_divides('batch_size', config.batch_size, divisor, devices * count)
  if spec.uses_batch_statistics:
    raise errors.InputError(
      f"'{spec.name}' normalises batches, and run.accumulate={count} would "
      'make them smaller. Leave it out, or use a smaller batch_size.'
    )


def check_divides(
  name: str, value: int, divisor_name: str, divisor: int
) -> None:
  """Check that a setting is a positive multiple of a number.

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


def missing_split(split_setting: str, error: Exception) -> errors.InputError:
  """Return the error for a split that is not there, with the flag to use.

  Args:
    split_setting: 'train_split' or 'eval_split'.
    error: what the dataset says.
  """
  flag = f'--config.data.{split_setting}'
  advice = f'Name another with {flag}=SPLIT'
  if split_setting == 'eval_split':
    advice += f', or hold out a share of the training split with {flag}=10%'
  return errors.InputError(f'{error} {advice}.')


def check_examples(
  split_setting: str, split: str, examples: int, minimum: int
) -> None:
  """Check that a split is large enough.

  Raises:
    errors.InputError: if it is not.
  """
  if examples < minimum:
    purpose = 'one per data shard' if minimum > 1 else 'to evaluate'
    raise errors.InputError(
      f"data.{split_setting} '{split}' has {examples} examples; it needs at "
      f'least {minimum}, {purpose}.'
    )


def check_steps(
  config: ml_collections.ConfigDict, units: durations.Units
) -> None:
  """Check that durations are at least one step, once the data is known.

  Raises:
    errors.InputError: naming the setting.
  """
  for name, duration in (
    ('train_for', config.train_for),
    ('optimizer.decay_every', config.optimizer.decay_every),
  ):
    if duration is not None and units.steps(duration) < 1:
      raise errors.InputError(
        f"{name} '{duration}' is less than one step of {config.batch_size} "
        'examples.'
      )


def check_run(
  config: ml_collections.ConfigDict, units: durations.Units
) -> None:
  """Check that a run fits its data and its own length.

  Raises:
    errors.InputError: if a batch is larger than an epoch, or the warm-up is
      longer than the run.
  """
  copies = config.data.multiplicity
  if config.batch_size // copies > units.examples:
    augmentation = base.read_fields(preprocessing.Augmentation, config.data)
    images = config.data.shards * augmentation.examples_per_copy
    largest = int(units.examples) // images * images * copies
    raise errors.InputError(
      f'batch_size {config.batch_size} is more than the {units.examples} '
      f"images of data.train_split '{config.data.train_split}'. Use "
      f'--config.batch_size={largest} or less.'
    )
  warmup = config.optimizer.warmup
  if units.steps(warmup) > units.steps(config.train_for):
    raise errors.InputError(
      f"optimizer.warmup '{warmup}' is longer than train_for "
      f"'{config.train_for}'. Use a longer run, or a shorter warm-up such as "
      "--config.optimizer.warmup='0 steps'."
    )


def check_same_experiment(
  saved: ml_collections.ConfigDict, config: ml_collections.ConfigDict, run: str
) -> None:
  """Check that a run is resumed with the configuration that it was begun with.

  Args:
    saved: of the run.
    config: resolved.
    run: the workdir.

  Raises:
    errors.InputError: with the settings that differ.
  """
  before, now = base.flat(saved), base.flat(config)
  differing = [
    f'{name}: {before.get(name)} there, {now.get(name)} here'
    for name in sorted(before.keys() | now.keys())
    if not name.startswith('run.') and before.get(name) != now.get(name)
  ]
  if differing:
    raise errors.InputError(
      f"'{run}' holds another experiment ({'; '.join(differing)}). Use "
      'another --workdir, or the same settings.'
    )
