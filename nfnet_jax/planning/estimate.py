"""A plan: what a workload costs on a pod, in numbers."""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from nfnet_jax.planning import compilation, costs, topology

_TIMES = (
  'step_ms',
  'images_per_second',
  'model_flops_utilisation',
  'decoded_per_second_and_host',
  'epoch_minutes',
  'total_hours',
  'chip_hours',
)


@dataclasses.dataclass(frozen=True)
class Workload:
  """What is trained, as far as a plan needs to know.

  Attributes:
    config: name of the experiment.
    model: name of the model.
    image_size: pixels a side in training.
    dtype: of the forward and backward pass.
    batch: examples of a step on all devices.
    steps: of the whole schedule.
    examples: of an epoch, or None if nobody knows.
    decoded: images that are decoded for each one delivered.
    macs: multiply-adds of the forward pass of an image.
    parameter_bytes: of the parameters.
    state_bytes: of the whole state: parameters, momentum, average, ...
    kept_bytes: of the state on each device; less if the update is sharded.
    parts: in which a device takes the gradient of its examples.
    ascent: examples of a device by which SAM climbs; 0 without it.
    remat: whether the backward pass computes the blocks again.
    fast_stem: whether the stem is computed on blocks of pixels.
    fused_blocks: whether blocks take fewer passes over their activations.
    fast_convs: whether convolutions are computed as CPUs do it quickly.
    shard_update: whether each device updates its share of the parameters.
  """

  config: str
  model: str
  image_size: int
  dtype: str
  batch: int
  steps: int
  examples: int | None
  decoded: int
  macs: int
  parameter_bytes: int
  state_bytes: int
  kept_bytes: int
  parts: int = 1
  ascent: int = 0
  remat: bool = False
  fast_stem: bool = False
  fused_blocks: bool = False
  fast_convs: bool = False
  shard_update: bool = False


@dataclasses.dataclass(frozen=True)
class Shortage:
  """By how much a program does not fit.

  Attributes:
    needed: bytes a device, as the compiler says.
    largest_batch: examples a device that do fit; 0 if not even one.
    tried: examples a device that were compiled to find that out.
    shards: the data shards that such a batch takes, if not those there are.
  """

  needed: int
  largest_batch: int
  tried: Sequence[int]
  shards: int | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
  """A workload on a pod: either compiled and read, or too large.

  Attributes:
    workload: what is trained.
    pod: on what.
    effort: how hard the compiler tried; see `compilation.EFFORTS`.
    compiled: the program, if it fits.
    schedule: what it costs, if it fits.
    shortage: why it does not fit.
  """

  workload: Workload
  pod: topology.Pod
  effort: str
  compiled: compilation.Compiled | None = None
  schedule: costs.Schedule | None = None
  shortage: Shortage | None = None

  @property
  def name(self) -> str:
    work = self.workload
    return f'{work.config} {work.batch:,} {self.pod.name}'

  def numbers(self) -> dict[str, Any]:
    """Returns everything that the plan knows, by stable names.

    Seconds and what follows from them are None where the TPU's clock is not
    known, and everything after the memory where the program does not fit.
    """
    work, pod = self.workload, self.pod
    devices = len(pod.devices)
    return {
      'config': work.config,
      'model': work.model,
      'topology': pod.name,
      'effort': self.effort,
      'image_size': work.image_size,
      'compute_dtype': work.dtype,
      'device': pod.generation.device,
      'devices': devices,
      'chips': pod.chips,
      'hosts': pod.hosts,
      'batch_size': work.batch,
      'batch_per_device': work.batch // devices,
      'accumulate': work.parts,
      'remat': work.remat,
      'fast_stem': work.fast_stem,
      'fused_blocks': work.fused_blocks,
      'fast_convs': work.fast_convs,
      'shard_update': work.shard_update,
      'total_steps': work.steps,
      'parameter_bytes': work.parameter_bytes,
      'state_bytes': work.state_bytes,
      'state_bytes_per_device': work.kept_bytes,
      'available_bytes': pod.generation.memory_bytes,
      **(self._cost() if self.compiled else self._lack()),
    }

  def _lack(self) -> dict[str, Any]:
    lack, available = self.shortage, self.pod.generation.memory_bytes
    return {
      'fits': False,
      'peak_bytes': lack.needed,
      'lacking_bytes': lack.needed - available,
      'largest_batch_per_device': lack.largest_batch,
      'largest_batch_size': lack.largest_batch * len(self.pod.devices),
      'largest_batch_shards': lack.shards,
      'tried_batch_per_device': list(lack.tried),
    }

  def _cost(self) -> dict[str, Any]:
    work, compiled, schedule = self.workload, self.compiled, self.schedule
    devices = len(self.pod.devices)
    sent = sum(each.sent for each in schedule.collectives)
    return {
      'fits': True,
      'peak_bytes': compiled.peak_bytes,
      'argument_bytes': compiled.argument_bytes,
      'temp_bytes': compiled.temp_bytes,
      'compile_s': compiled.seconds,
      'cached': compiled.cached,
      'flops_per_step': compiled.flops * self._recount() * devices,
      # Forward pass once, backward pass twice; a multiply-add is two.
      'model_flops_per_step': 6 * work.macs * work.batch,
      'step_cycles': schedule.cycles,
      **self._times(),
      'collective_bytes': sum(each.payload for each in schedule.collectives),
      'collective_sent_bytes': sent,
      # A chip's devices sum up among themselves first, so it sends this once.
      'collective_ms_by_bandwidth': 1e3 * sent / self.pod.generation.links,
      'unknown_loops': schedule.unknown_loops,
      'cycles': {
        part.name: {'forward': part.forward, 'backward': part.backward}
        for part in schedule.parts
      },
    }

  def _recount(self) -> float:
    """Returns a step's work over what the compiler counts of it.

    Of a loop over parts it counts one. An example costs as much in SAM's
    ascent, which has a loop of its own, as in the descent; the update, outside
    of both, is less than a hundredth.
    """
    work = self.workload
    descent = work.batch // len(self.pod.devices)
    # As `step.Trainer.gradients` divides them.
    parts_of_ascent = math.gcd(work.parts, work.ascent)
    counted = descent / work.parts + work.ascent / parts_of_ascent
    return (descent + work.ascent) / counted

  def _times(self) -> dict[str, float | None]:
    work, kind = self.workload, self.pod.generation
    if kind.clock is None:
      return dict.fromkeys(_TIMES)
    seconds = self.schedule.cycles / kind.clock
    rate = work.batch / seconds
    flops = 6 * work.macs * rate / len(self.pod.devices)
    hours = work.steps * seconds / 3600
    return {
      'step_ms': 1e3 * seconds,
      'images_per_second': rate,
      'model_flops_utilisation': flops / kind.peak,
      'decoded_per_second_and_host': work.decoded * rate / self.pod.hosts,
      'epoch_minutes': work.examples and work.examples / rate / 60,
      'total_hours': hours,
      'chip_hours': hours * self.pod.chips,
    }
