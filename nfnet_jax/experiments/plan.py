"""Plans a run on a TPU pod without one: does it fit, how long does it take.

  python -m nfnet_jax.experiments.plan --config=f3 --topology=v3:8x8

compiles the very training step of the config for that pod with the real TPU
compiler (`pip install 'nfnet_jax[plan]'`), which takes minutes, and prints
memory, the compiler's own estimate of the step, what follows from it, and where
the cycles go. The data need not be there. `--quick` compiles in less time:
memory is the same, cycles are pessimistic. `--compare=f1,2048,v3:4x8` sets
other configs, batch sizes and topologies beside the first, each changing one
thing. `--json` prints one object; with `--compare` it holds a list, `plans`.
`--out` also writes plan.png. What was compiled once is kept under ~/.cache.
"""

import dataclasses
import json
import re

from absl import flags

from nfnet_jax import errors
from nfnet_jax.cli import command, common_flags
from nfnet_jax.config import lookup

for _name in ('config', 'list_configs', 'json', 'out'):
  flags.declare_key_flag(_name)
_TOPOLOGY = flags.DEFINE_string(
  'topology', None, 'Pod: GENERATION:LAYOUT in chips, such as v3:8x8.'
)
_QUICK = flags.DEFINE_bool('quick', False, 'Lets the compiler try less hard.')
_COMPARE = flags.DEFINE_list(
  'compare', [], 'Configs, batch sizes and topologies to set beside.'
)
_EXAMPLES = flags.DEFINE_integer(
  'examples', None, 'Training examples, if not known.', lower_bound=1
)
_NUM_CLASSES = flags.DEFINE_integer(
  'num_classes', None, 'Classes, if not known.', lower_bound=1
)


def main() -> None:
  import jax

  from nfnet_jax.planning import plan_errors, report

  # Compiling needs no accelerator, and must not take one.
  jax.config.update('jax_platforms', 'cpu')

  if not _TOPOLOGY.value:
    raise errors.InputError('Say on which pod: --topology=v3:8x8.')
  with errors.as_input_error(plan_errors.PlanError):
    candidates = _candidates()
    out = common_flags.get_out() if common_flags.OUT.present else None
    plans = [candidate.plan() for candidate in candidates]
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


def _candidates() -> list['Candidate']:
  """Reads what is to be planned, and checks all of it before any compiling."""
  base = lookup.get_config_name(), lookup.get_config(), _TOPOLOGY.value
  variants = [base]
  for item in _COMPARE.value:
    name, config, topology = base
    if re.fullmatch(r'\d+', item):
      config = config.copy_and_resolve_references()
      config.batch_size = int(item)
    elif re.fullmatch(r'v\d\w*:[\dx]+', item):
      topology = item
    else:
      name, config = item, lookup.load_config(item)
    variants.append((name, config, topology))
  return [Candidate.of(*variant) for variant in variants]


@dataclasses.dataclass(frozen=True)
class Dataset:
  """What of a dataset a plan needs; stands in for a `sources.Source`."""

  num_classes: int
  examples: int | None

  def num_examples(self, split: str) -> float:
    return float('nan') if self.examples is None else self.examples


def get_dataset(config) -> Dataset:
  """Finds the numbers of a config's dataset without opening it.

  Raises:
    errors.InputError: if one is not known, and the way out.
  """
  from nfnet_jax.data import known

  dataset = known.DATASETS.get(config.dataset)
  classes = _NUM_CLASSES.value or (dataset and dataset.num_classes)
  examples = _EXAMPLES.value or (
    dataset and dataset.num_examples(config.data.train_split)
  )
  if classes is None:
    raise errors.InputError(
      f"How many classes '{config.dataset}' has is not known here: give "
      '--num_classes=N.'
    )
  optimizer = config.optimizer
  durations = config.train_for, optimizer.warmup, optimizer.decay_every or ''
  if examples is None and any('epoch' in each for each in durations):
    raise errors.InputError(
      f"How many examples '{config.data.train_split}' of '{config.dataset}' "
      'has is not known here: give --examples=N, or durations in steps.'
    )
  return Dataset(classes, examples)


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A config on a pod, checked.

  Attributes:
    experiment: an `experiment_lib.Experiment` on a `Dataset`.
    pod: a `topology.Pod`.
    workload: an `estimate.Workload`.
    given: the config before anything was derived from it.
  """

  experiment: object
  pod: object
  workload: object
  given: object

  @classmethod
  def of(cls, name: str, config, topology_name: str) -> 'Candidate':
    """Checks a config and asks libtpu for the pod.

    Raises:
      errors.InputError: in one line, what is wrong and the way out.
    """
    from nfnet_jax.config import experiment as experiment_lib
    from nfnet_jax.config import validate
    from nfnet_jax.planning import topology

    dataset, pod = get_dataset(config), topology.get_pod(topology_name)
    devices = len(pod.devices)
    resolved = validate.resolve_and_check(config, 'tpu', devices)
    validate.check_layout(resolved, devices)
    experiment = experiment_lib.Experiment(resolved, dataset)
    workload = get_workload(name, experiment, devices)
    return cls(experiment, pod, workload, config)

  def plan(self):
    """Compiles the step; where it does not fit, looks for what does."""
    from nfnet_jax.planning import costs, estimate, plan_errors

    effort = 'quick' if _QUICK.value else 'full'
    made = estimate.Plan(self.workload, self.pod, effort)
    try:
      compiled = self._compile(effort)
    except plan_errors.DoesNotFitError as error:
      shortage = self._shortage(error.needed, error.available)
      return dataclasses.replace(made, shortage=shortage)
    return dataclasses.replace(
      made,
      compiled=compiled,
      schedule=costs.read(compiled.text, len(self.pod.devices)),
    )

  def _compile(self, effort: str):
    from nfnet_jax.planning import compilation
    from nfnet_jax.training import data_parallel

    experiment, devices = self.experiment, self.pod.devices
    lowered = data_parallel.DataParallel(devices).lower(
      experiment.sharded_trainer(len(devices)) or experiment.trainer,
      experiment.abstract_state(),
      experiment.train_shapes(),
    )
    config, pod = experiment.config, self.pod.name
    batch = config.batch_size // len(self.pod.devices)
    said = (
      f'Compiling {config.model.name} for {pod}, {batch} images a '
      f'{self.pod.generation.device} ({effort}) ...'
    )
    return compilation.compile_step(
      lowered, pod, effort, watch=lambda: command.working(said)
    )

  def _shortage(self, needed: int, available: int):
    """Looks for the largest batch that fits; memory needs no full effort."""
    from nfnet_jax.planning import estimate, largest_batch, plan_errors

    devices = len(self.pod.devices)
    parts = self.experiment.config.run.accumulate

    def measure(part: int) -> int:
      config = self.experiment.config.copy_and_resolve_references()
      with config.unlocked():
        config.batch_size = part * parts * devices
      smaller = dataclasses.replace(self.experiment, config=config)
      try:
        candidate = dataclasses.replace(self, experiment=smaller)
        # What compiles fits, whatever the sum of its parts.
        return min(candidate._compile('quick').peak_bytes, available)
      except plan_errors.DoesNotFitError as error:
        return error.needed

    part = self.experiment.config.batch_size // (devices * parts)
    largest, tried = largest_batch.largest_batch(
      part, needed, available, measure
    )
    largest, tried = largest * parts, [each * parts for each in tried]
    if self.experiment.config.data.partners == 'in_batch':
      largest -= largest % 2  # A shard's examples are mixed in pairs.
    return estimate.Shortage(needed, largest, tried, self._shards(largest))

  def _shards(self, batch: int) -> int | None:
    """Returns the data shards to ask for with a batch a device, if need be."""
    from nfnet_jax.config import validate

    devices = len(self.pod.devices)
    if not batch:
      return None
    config = self.given.copy_and_resolve_references()
    config.batch_size = batch * devices
    try:
      resolved = validate.resolve_and_check(config, 'tpu', devices)
      validate.check_layout(resolved, devices)
    except errors.InputError:
      return devices
    same = resolved.run.accumulate == self.experiment.config.run.accumulate
    return None if same else devices


def get_workload(name: str, experiment, devices: int):
  """Gathers what a plan needs to know of an experiment.

  Args:
    name: of its config.
    experiment: an `experiment_lib.Experiment`.
    devices: how many it runs on.

  Raises:
    errors.InputError: if its durations make no sense.
  """
  import jax

  from nfnet_jax.models import complexity
  from nfnet_jax.planning import estimate

  config = experiment.config
  state, model = experiment.abstract_state(), experiment.plain_model
  data, run = config.data, config.run
  sharded = experiment.sharded_trainer(devices)
  mixes = data.mixup or data.cutmix
  size = lambda tree: sum(
    leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
  )
  return estimate.Workload(
    config=name,
    model=config.model.name,
    image_size=data.image_size,
    dtype=config.compute_dtype,
    batch=config.batch_size,
    steps=experiment.cadence.total,
    examples=experiment.source.examples,
    decoded=2 if mixes and data.partners == 'fresh' else 1,
    macs=complexity.count_image_macs(
      model, state.params, state.model_state, data.image_size
    ),
    parameter_bytes=size(state.params),
    state_bytes=size(state),
    kept_bytes=size(_kept(sharded, state) if sharded else state),
    parts=run.accumulate,
    ascent=_ascent(config, devices),
    remat=run.remat,
    fast_stem=run.fast_stem,
    fused_blocks=run.fused_blocks,
    fast_convs=run.fast_convs,
    shard_update=sharded is not None,
  )


def _ascent(config, devices: int) -> int:
  """Counts the examples of a device by which SAM climbs."""
  from nfnet_jax.training import sam

  if not config.optimizer.sam_rho:
    return 0
  size = config.batch_size // devices
  return sam.sub_size(size, config.optimizer.sam_share)


def _kept(sharded, state):
  """Returns the shapes of what one device keeps of a state."""
  import jax

  from nfnet_jax.training import data_parallel

  split = jax.vmap(
    sharded.shard,
    in_axes=None,
    axis_size=sharded.devices,
    axis_name=data_parallel.AXIS,
  )
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype),
    jax.eval_shape(split, state),
  )


if __name__ == '__main__':
  command.run(main)
