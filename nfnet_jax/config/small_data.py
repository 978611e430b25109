"""Settings that follow from the number of training images.

A configuration that leaves one of `SETTINGS` without a value gets it from its
dataset, as `--config=finetune:small` does. docs/fine_tuning.md describes the
rules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_collections

from nfnet_jax import errors
from nfnet_jax.config import base, durations, resolve

if TYPE_CHECKING:
  from nfnet_jax.config import experiment as experiment_lib

SETTINGS = ('batch_size', 'train_for', 'ema_decay', 'data.eval_split')

# Names of a split for evaluation, and the share of the training split that is
# held out if there is none.
_EVAL_SPLITS = ('validation', 'valid', 'val', 'test')
_HELD_OUT = '20%'
# The batch is the largest of these that leaves this many steps per epoch.
_BATCH_SIZES = (64, 32, 16)
_STEPS_PER_EPOCH = 30
# Length of the run in steps, within limits in epochs.
_STEPS = 1000
_EPOCHS = (10, 50)
# The EMA averages about the last tenth of the run.
_AVERAGED = 0.1


def is_complete(config: ml_collections.ConfigDict) -> bool:
  """Return whether nothing of a configuration is left to its dataset."""
  values = base.flat(config)
  return all(values[name] is not None for name in SETTINGS)


def complete(
  config: ml_collections.ConfigDict, dataset: experiment_lib.Dataset
) -> ml_collections.ConfigDict:
  """Return a configuration with the values that follow from its dataset.

  Raises:
    errors.InputError: if there is no such training split, or `train_for` is not
      a duration.
  """
  config = config.copy_and_resolve_references()
  if config.data.eval_split is None:
    known = [name for name in _EVAL_SPLITS if name in dataset.splits]
    config.data.eval_split = known[0] if known else _HELD_OUT
  resolve.hold_out(config.data)
  with errors.as_input_error():
    examples = dataset.num_examples(config.data.train_split)
  if config.batch_size is None:
    config.batch_size = _batch_size(examples)
  if config.train_for is None:
    config.train_for = _train_for(examples, config.batch_size)
  if config.ema_decay is None:
    with errors.as_input_error():
      units = durations.Units(config.batch_size, examples)
      steps = max(units.steps(config.train_for), 1 / _AVERAGED)
    config.ema_decay = round(1 - 1 / (_AVERAGED * steps), 4)
  return config


def _batch_size(examples: float) -> int:
  for size in _BATCH_SIZES:
    if examples >= _STEPS_PER_EPOCH * size:
      return size
  return _BATCH_SIZES[-1]


def _train_for(examples: float, batch_size: int) -> str:
  fewest, most = _EPOCHS
  epochs = round(_STEPS * batch_size / max(examples, 1))
  return f'{min(max(epochs, fewest), most)} epochs'
