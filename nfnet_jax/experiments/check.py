"""Check the flags of a training run before its TPU is rented.

  python -m nfnet_jax.experiments.check --config=f3 --accelerator_type=v3-128

takes the flags of train, and checks them for that TPU on this machine: names,
values, and that the batch divides over the TPU's cores. If libtpu is installed
(`pip install '.[plan]'`), it also plans the run as the command plan
does, which takes minutes: whether the training step fits into memory, its time,
the chip-hours and, with `--price_per_chip_hour`, the cost. `--noplan` leaves
this out. No dataset, workdir or TPU is touched. Exits with 2 if training would
refuse the flags or the step does not fit. `--json` prints one object.
"""

from __future__ import annotations

import importlib.util
import json
from typing import Any, TYPE_CHECKING

from absl import flags
import ml_collections

from nfnet_jax import errors
from nfnet_jax.cli import (
  command,
  common_flags,
  config_flag,
  planners,
  profile,
  session,
)

if TYPE_CHECKING:
  from nfnet_jax.planning import accelerators, estimate

# Those of train.
for _name in (
  *config_flag.FLAGS,
  'workdir',
  'json',
  *profile.FLAGS,
  *session.FLAGS,
):
  flags.declare_key_flag(_name)
_ACCELERATOR_TYPE = flags.DEFINE_string(
  'accelerator_type', None, 'TPU as Cloud names it, such as v3-128.'
)
_PLAN = flags.DEFINE_bool('plan', True, 'Compiles the training step.')
_PRICE = flags.DEFINE_float(
  'price_per_chip_hour',
  None,
  'Price of a chip for an hour, in any currency.',
  lower_bound=0,
)


def main() -> None:
  """Check train's flags for `--accelerator_type`, and print the plan."""
  import jax

  from nfnet_jax.planning import accelerators, plan_errors

  # Nothing here needs an accelerator, or may occupy one.
  jax.config.update('jax_platforms', 'cpu')
  if not _ACCELERATOR_TYPE.value:
    raise errors.InputError(
      'The TPU is missing. Give its type: --accelerator_type=v3-128.'
    )
  config = config_flag.get_config()
  with errors.as_input_error(plan_errors.PlanError):
    accelerator = accelerators.parse(_ACCELERATOR_TYPE.value)
    sizes = _sizes(_check(config, accelerator), accelerator)
    command.log(
      f'The flags are valid for {accelerator.name}: batch '
      f'{sizes["batch_size"]:,}, {sizes["batch_per_device"]} per device.'
    )
    plan = _plan(config, accelerator)
  _print(sizes, plan)


def _check(
  config: ml_collections.ConfigDict, accelerator: accelerators.Accelerator
) -> ml_collections.ConfigDict:
  """Check the flags as far as training does without its data.

  Returns:
    The resolved configuration.

  Raises:
    errors.InputError: if training would not accept them.
  """
  from nfnet_jax.config import steps

  traced = profile.get_steps()
  devices, memory = accelerator.devices, accelerator.memory
  if _has_known_dataset(config):
    experiment = planners.open_experiment(config, devices, memory)
    profile.check_total(traced, experiment.cadence.total)
    return experiment.config
  return steps.prepare_config(
    config, platform='tpu', devices=devices, memory=memory
  )


def _has_known_dataset(config: ml_collections.ConfigDict) -> bool:
  try:
    planners.get_dataset(config)
  except errors.InputError:
    return False
  return True


def _sizes(
  config: ml_collections.ConfigDict, accelerator: accelerators.Accelerator
) -> dict[str, Any]:
  return {
    'accelerator_type': accelerator.name,
    'devices': accelerator.devices,
    'batch_size': config.batch_size,
    'batch_per_device': config.batch_size // accelerator.devices,
    'accumulate': config.run.accumulate,
    'remat': config.run.remat,
  }


def _plan(
  config: ml_collections.ConfigDict, accelerator: accelerators.Accelerator
) -> estimate.Plan | None:
  """Plan a run that was checked; or log why not, and return None.

  Raises:
    plan_errors.PlanError: if libtpu cannot be used now.
  """
  reason = ''
  if not _PLAN.value:
    reason = '--noplan'
  elif importlib.util.find_spec('libtpu') is None:
    reason = "libtpu is missing. Run in your clone: pip install '.[plan]'"
  elif not _has_known_dataset(config):
    split = config.data.train_split
    reason = f"the size of '{config.dataset}', split '{split}', is not known"
  if reason or not accelerator.topology:
    reason = reason or f'the layout of {accelerator.name} is not known'
    command.log(f'Memory, time and cost were not estimated: {reason}.')
    return None
  name = config_flag.get_name()
  return planners.make(name, config, accelerator.topology).plan('full')


def _print(sizes: dict[str, Any], plan: estimate.Plan | None) -> None:
  """Print the results.

  Raises:
    errors.InputError: if the training step does not fit into memory.
  """
  from nfnet_jax.planning import report

  numbers = plan.numbers() if plan else {}
  cost = _cost(numbers)
  if common_flags.JSON.value:
    print(json.dumps(sizes | numbers | {'cost': cost}))
  elif plan:
    print(report.overview(plan))
    if cost is not None:
      print(
        f'cost         {cost:,.2f} estimated for the steps: '
        f'{numbers["chip_hours"]:,.1f} chip-hours at {_PRICE.value:g}'
      )
  if plan and not numbers['fits']:
    raise errors.InputError(
      f"'{numbers['config']}' does not fit into the memory of "
      f'{sizes["accelerator_type"]}: '
      f'{report.size(numbers["lacking_bytes"])} per {numbers["device"]} are '
      'missing. Set a smaller --config.batch_size, --config.run.remat=True, or '
      'choose a TPU with more memory.'
    )


def _cost(numbers: dict[str, Any]) -> float | None:
  """Return the estimated cost, None without a price or an estimated time."""
  hours = numbers.get('chip_hours')
  return None if _PRICE.value is None or hours is None else _PRICE.value * hours


if __name__ == '__main__':
  command.run(main)
