"""Planners of configs on TPU pods, for the commands that compile for a pod."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import TYPE_CHECKING

from absl import flags
import ml_collections

from nfnet_jax import errors
from nfnet_jax.cli import command
from nfnet_jax.data import known

if TYPE_CHECKING:
  import jax

  from nfnet_jax.config import experiment as experiment_lib
  from nfnet_jax.planning import planner as planner_lib
  from nfnet_jax.planning import workload as workload_lib

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
FLAGS = ('examples', 'num_classes')


def make(
  name: str, config: ml_collections.ConfigDict, topology_name: str
) -> planner_lib.Planner:
  """Check a config on a topology, and return what plans it.

  Raises:
    errors.InputError: if training would not accept the config.
    plan_errors.PlanError: if libtpu does not provide the topology.
  """
  from nfnet_jax.planning import planner as planner_lib
  from nfnet_jax.planning import topology

  pod = topology.get_pod(topology_name)
  devices, memory = len(pod.devices), pod.generation.memory_bytes
  experiment = open_experiment(config, devices, memory)
  return planner_lib.Planner(
    workload=_workload(name, experiment, devices),
    pod=pod,
    lower=functools.partial(_lower, experiment, pod.devices),
    accept=functools.partial(_accept, config, experiment, devices, memory),
    progress=command.working,
  )


def open_experiment(
  config: ml_collections.ConfigDict, devices: int, memory: int
) -> experiment_lib.Experiment:
  """Check a config as for training on TPUs, without opening its dataset.

  Args:
    config: the config before it is resolved.
    devices: number of devices.
    memory: bytes of a device.

  Raises:
    errors.InputError: if training would not accept the config.
  """
  from nfnet_jax.config import steps, validate

  experiment = steps.open_experiment(
    config,
    platform='tpu',
    devices=devices,
    memory=memory,
    dataset=get_dataset(config),
  )
  validate.check_run(experiment.config, experiment.units)
  return experiment


@dataclasses.dataclass(frozen=True)
class Dataset:
  """The numbers of a dataset, in place of a `data.sources.Source`.

  Attributes:
    num_classes: number of classes.
    examples: number of training examples if it was given, else None.
    facts: what is known of it, if anything.
  """

  num_classes: int
  examples: int | None
  facts: known.Known | None

  @property
  def splits(self) -> list[str]:
    """Names of the known splits."""
    return list(self.facts.splits) if self.facts else []

  def num_examples(self, split: str) -> float:
    """Return the number of examples of the training split, or NaN."""
    count = self.examples
    if count is None and self.facts:
      count = self.facts.num_examples(split)
    return float('nan') if count is None else count


def get_dataset(config: ml_collections.ConfigDict) -> Dataset:
  """Return the numbers of a config's dataset without opening it.

  Raises:
    errors.InputError: if a number that the plan needs is unknown.
  """
  facts, split = known.DATASETS.get(config.dataset), config.data.train_split
  classes = _NUM_CLASSES.value or (facts.num_classes if facts else None)
  if classes is None:
    raise errors.InputError(
      f"The number of classes of '{config.dataset}' is unknown. Give "
      '--num_classes=N.'
    )
  optimizer = config.optimizer
  durations = config.train_for, optimizer.warmup, optimizer.decay_every
  # Without a value, they follow from the number of examples.
  needs_examples = None in (config.train_for, config.batch_size) or any(
    'epoch' in (each or '') for each in durations
  )
  dataset = Dataset(classes, _EXAMPLES.value, facts)
  if math.isnan(dataset.num_examples(split)) and needs_examples:
    raise errors.InputError(
      f"The number of examples of '{split}' of '{config.dataset}' is unknown. "
      'Give --examples=N, or durations in steps and a batch size.'
    )
  return dataset


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
  examples = experiment.source.num_examples(data.train_split)
  titles = {name: path.title for name, path in fast_paths.FAST_PATHS.items()}
  augmentation = experiment.augmentation
  return workload_lib.Workload(
    config=name,
    model=config.model.name,
    image_size=data.image_size,
    dtype=config.compute_dtype,
    batch=config.batch_size,
    steps=experiment.cadence.total,
    examples=None if math.isnan(examples) else int(examples),
    decoded=augmentation.records_per_group / augmentation.examples_per_group,
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
  memory: int,
  batch: int,
) -> tuple[int, dict[str, int]]:
  """Return a batch per device that training accepts, and settings for it.

  Args:
    config: the config of the experiment before it was resolved.
    experiment: the planned experiment, whose number of microbatches must stay.
    devices: number of devices.
    memory: bytes of a device.
    batch: the batch per device that fits.

  Returns:
    The batch per device, and the settings without which the config would not be
    accepted with it, or not have the number of microbatches.
  """
  count = experiment.config.run.accumulate
  # A shard holds all examples of a group.
  batch -= batch % math.lcm(experiment.augmentation.examples_per_group, count)
  if not batch:
    return 0, {}
  config = config.copy_and_resolve_references()
  config.batch_size = batch * devices
  settings = {}
  try:
    run = open_experiment(config, devices, memory).config.run
  except errors.InputError:
    config.data.shards = settings['data.shards'] = devices
    run = open_experiment(config, devices, memory).config.run
  if run.accumulate != count:
    settings['run.accumulate'] = count
  return batch, settings
