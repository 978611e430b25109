"""Plan a training run for a TPU pod without one: memory, step time, schedule.

  python -m nfnet_jax.experiments.plan --config=f3 --topology=v3:8x8

compiles the training step of the config for that pod with the real TPU compiler
(`pip install 'nfnet_jax[plan]'`), which takes minutes. It prints the memory,
the compiler's own estimate of the step, the throughput and schedule that
result, and the cycles by category. If the step does not fit, it searches for
the largest batch that does. The dataset need not exist. `--quick` compiles in
less time: memory is the same, cycles are pessimistic. With
`--compare=f1,2048,v3:4x8` each further plan differs from the first in a config,
batch size or topology. `--json` prints one object; with `--compare` it holds a
list, `plans`. `--out` also writes plan.png. Compiled programs are cached in
~/.cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import json
import re
from typing import TYPE_CHECKING

from absl import flags
import ml_collections

from nfnet_jax import errors
from nfnet_jax.cli import command, common_flags, config_flag
from nfnet_jax.config import lookup
from nfnet_jax.data import known

if TYPE_CHECKING:
  import jax

  from nfnet_jax.config import experiment as experiment_lib
  from nfnet_jax.planning import planner as planner_lib
  from nfnet_jax.planning import workload as workload_lib

for _name in (*config_flag.FLAGS, 'json', 'out'):
  flags.declare_key_flag(_name)
_TOPOLOGY = flags.DEFINE_string(
  'topology', None, 'Pod: GENERATION:LAYOUT in chips, such as v3:8x8.'
)
_QUICK = flags.DEFINE_bool(
  'quick', False, 'Compiles in less time, with pessimistic cycles.'
)
_COMPARE = flags.DEFINE_list(
  'compare', [], 'Configs, batch sizes and topologies to compare with.'
)
_EXAMPLES = flags.DEFINE_integer(
  'examples',
  None,
  'Number of training examples, for datasets of unknown size.',
  lower_bound=1,
)
_NUM_CLASSES = flags.DEFINE_integer(
  'num_classes',
  None,
  'Number of classes, for datasets where it is unknown.',
  lower_bound=1,
)


def main() -> None:
  """Print the plan of `--config` on `--topology`, or a comparison."""
  import jax

  from nfnet_jax.planning import plan_errors, report

  # Compiling needs no accelerator, and must not occupy one.
  jax.config.update('jax_platforms', 'cpu')

  if not _TOPOLOGY.value:
    raise errors.InputError(
      'The pod is missing. Give its topology: --topology=v3:8x8.'
    )
  effort = 'quick' if _QUICK.value else 'full'
  with errors.as_input_error(plan_errors.PlanError):
    # All input is checked before anything is compiled.
    planners = [_planner(*variant) for variant in _variants(_TOPOLOGY.value)]
    out = common_flags.get_out() if common_flags.OUT.present else None
    plans = [planner.plan(effort) for planner in planners]
  if common_flags.JSON.value:
    rows = [plan.numbers() for plan in plans]
    print(json.dumps({'plans': rows} if _COMPARE.value else rows[0]))
  elif _COMPARE.value:
    print(report.comparison(plans))
  else:
    print(report.summary(plans[0]))
  if out:
    path = out / 'plan.png'
    report.draw(plans, path)
    command.log(str(path))


def _variants(
  topology: str,
) -> Iterator[tuple[str, ml_collections.ConfigDict, str]]:
  """Yield a config's name, config and topology, then those of `--compare`."""
  base_name, base_config = config_flag.get_name(), config_flag.get_config()
  yield base_name, base_config, topology
  for item in _COMPARE.value:
    if re.fullmatch(r'\d+', item):
      config = base_config.copy_and_resolve_references()
      config.batch_size = int(item)
      yield base_name, config, topology
    elif re.fullmatch(r'v\d\w*:[\dx]+', item):
      yield base_name, base_config, item
    else:
      yield item, lookup.load(item, config_flag.get_overrides()), topology


def _planner(
  name: str, config: ml_collections.ConfigDict, topology_name: str
) -> planner_lib.Planner:
  """Check a config on a topology.

  Raises:
    errors.InputError: if training would not accept the config.
    plan_errors.PlanError: if libtpu does not provide the topology.
  """
  from nfnet_jax.planning import planner as planner_lib
  from nfnet_jax.planning import topology

  pod = topology.get_pod(topology_name)
  experiment = _experiment(config, len(pod.devices))
  return planner_lib.Planner(
    workload=_workload(name, experiment, len(pod.devices)),
    pod=pod,
    lower=functools.partial(_lower, experiment, pod.devices),
    accept=functools.partial(_accept, config, experiment, len(pod.devices)),
    progress=command.working,
  )


def _experiment(
  config: ml_collections.ConfigDict, devices: int
) -> experiment_lib.Experiment:
  """Check a config as for training on TPUs, without opening its dataset.

  Raises:
    errors.InputError: if training would not accept the config.
  """
  from nfnet_jax.config import steps

  return steps.open_experiment(
    config, platform='tpu', devices=devices, dataset=get_dataset(config)
  )


@dataclasses.dataclass(frozen=True)
class Dataset:
  """The numbers of a dataset, in place of a `data.sources.Source`."""

  num_classes: int
  examples: int | None
  splits: Sequence[str]

  def num_examples(self, split: str) -> float:
    """Return the number of training examples, or NaN if it is unknown."""
    return float('nan') if self.examples is None else self.examples


def get_dataset(config: ml_collections.ConfigDict) -> Dataset:
  """Return the numbers of a config's dataset without opening it.

  Raises:
    errors.InputError: if a number that the plan needs is unknown.
  """
  dataset, split = known.DATASETS.get(config.dataset), config.data.train_split
  classes, examples = _NUM_CLASSES.value, _EXAMPLES.value
  if dataset:
    classes = classes or dataset.num_classes
    examples = examples or dataset.num_examples(split)
  if classes is None:
    raise errors.InputError(
      f"The number of classes of '{config.dataset}' is unknown. Give "
      '--num_classes=N.'
    )
  optimizer = config.optimizer
  durations = config.train_for, optimizer.warmup, optimizer.decay_every
  # Without a value, it follows from the number of examples.
  needs_examples = config.train_for is None or any(
    'epoch' in (each or '') for each in durations
  )
  if examples is None and needs_examples:
    raise errors.InputError(
      f"The number of examples of '{split}' of '{config.dataset}' is unknown. "
      'Give --examples=N, or durations in steps.'
    )
  return Dataset(classes, examples, list(dataset.splits) if dataset else [])


def _workload(
  name: str, experiment: experiment_lib.Experiment, devices: int
) -> workload_lib.Workload:
  """Return the sizes and settings that a plan depends on.

  Raises:
    errors.InputError: if the config's durations are invalid.
  """
  from nfnet_jax.config import fast_paths
  from nfnet_jax.models import complexity
  from nfnet_jax.planning import workload as workload_lib
  from nfnet_jax.training import sam

  config, state = experiment.config, experiment.abstract_state()
  data, optimizer, run = config.data, config.optimizer, config.run
  layout = experiment.trainer_on(devices).layout
  per_device = config.batch_size // devices
  sam_examples = sam.sub_size(per_device, optimizer.sam_share)
  chosen = [
    path
    for path in experiment.fast_paths
    if path != fast_paths.SHARD_UPDATE or layout.sharded
  ]
  titles = {name: path.title for name, path in fast_paths.FAST_PATHS.items()}
  mixes = data.mixup or data.cutmix
  return workload_lib.Workload(
    config=name,
    model=config.model.name,
    image_size=data.image_size,
    dtype=config.compute_dtype,
    batch=config.batch_size,
    steps=experiment.cadence.total,
    examples=get_dataset(config).examples,
    decoded=2 if mixes and data.partners == 'fresh' else 1,
    macs=complexity.count_image_macs(
      experiment.plain_model, state.params, state.model_state, data.image_size
    ),
    parameter_bytes=workload_lib.num_bytes(state.params),
    state_bytes=workload_lib.num_bytes(state),
    state_bytes_per_device=workload_lib.num_bytes(layout.shard_shapes(state)),
    microbatches=run.accumulate,
    sam_examples=sam_examples if optimizer.sam_rho else 0,
    remat=run.remat,
    fast_paths=tuple(chosen),
    fast_path_titles=titles,
  )


def _lower(
  experiment: experiment_lib.Experiment,
  devices: Sequence[jax.Device],
  batch: int,
) -> jax.stages.Lowered:
  """Lower the training step for a global batch size."""
  from nfnet_jax.training import data_parallel

  config = experiment.config.copy_and_resolve_references()
  with config.unlocked():
    config.batch_size = batch
  experiment = dataclasses.replace(experiment, config=config)
  return data_parallel.DataParallel(devices).lower(
    experiment.trainer_on(len(devices)),
    experiment.abstract_state(),
    experiment.train_shapes(),
  )


def _accept(
  config: ml_collections.ConfigDict,
  experiment: experiment_lib.Experiment,
  devices: int,
  batch: int,
) -> tuple[int, int | None]:
  """Return a batch per device that training accepts, and its data shards.

  Args:
    config: the config of the experiment before it was resolved.
    experiment: the planned experiment, whose number of microbatches must stay.
    devices: number of devices.
    batch: the batch per device that fits.

  Returns:
    The batch per device, and the `data.shards` to set with it; None if the
    config leads to a valid number.
  """
  if experiment.config.data.partners == 'in_batch':
    batch -= batch % 2  # The examples of a shard are mixed in pairs.
  if not batch:
    return 0, None
  config = config.copy_and_resolve_references()
  config.batch_size = batch * devices
  try:
    run = _experiment(config, devices).config.run
  except errors.InputError:
    return batch, devices
  same = run.accumulate == experiment.config.run.accumulate
  return batch, None if same else devices


if __name__ == '__main__':
  command.run(main)
