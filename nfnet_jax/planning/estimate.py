"""A plan: the cost of a workload on a pod, in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

from nfnet_jax.planning import compilation, costs, overlap, topology
from nfnet_jax.planning import workload as workload_lib

_TIMES = (
  'step_ms',
  'collective_ms_waited',
  'collective_ms_waited_at_best',
  'images_per_second',
  'model_flops_utilisation',
  'decoded_per_second_and_host',
  'epoch_minutes',
  'total_hours',
  'chip_hours',
)


@dataclasses.dataclass(frozen=True)
class Shortage:
  """The memory that a step lacks, and the largest batch that fits.

  Attributes:
    needed: bytes per device, as reported by the compiler.
    largest_batch: examples per device that fit; 0 if not even one does.
    tried: examples per device that were compiled in the search.
    settings: what else to set with the largest batch.
  """

  needed: int
  largest_batch: int
  tried: Sequence[int]
  settings: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Plan:
  """The plan of a workload on a pod.

  Attributes:
    workload: what is trained.
    pod: the devices that train it.
    effort: the compiler's effort; see `compilation.EFFORTS`.
    compiled: the compiled program, if it fits.
    schedule: the compiler's estimate of its cost, if it fits.
    shortage: the missing memory, if it does not fit.
  """

  workload: workload_lib.Workload
  pod: topology.Pod
  effort: str
  compiled: compilation.Compiled | None = None
  schedule: costs.Schedule | None = None
  shortage: Shortage | None = None

  @property
  def name(self) -> str:
    """The config, global batch size and topology."""
    work = self.workload
    return f'{work.config} {work.batch:,} {self.pod.name}'

  @functools.cached_property
  def overlap(self) -> overlap.Overlap | None:
    """The communication of the step, if it fits."""
    if not self.compiled:
      return None
    return overlap.read(self.compiled.text, len(self.pod.devices))

  def numbers(self) -> dict[str, Any]:
    """Return all numbers of the plan by stable names.

    Times and what is derived from them are None if the TPU's clock is unknown.
    If the program does not fit, the results of the search for the largest batch
    replace everything after the available memory.
    """
    work, pod = self.workload, self.pod
    devices = len(pod.devices)
    if self.compiled and self.schedule:
      results = self._costs(self.compiled, self.schedule)
    else:
      assert self.shortage
      results = self._shortage_numbers(self.shortage)
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
      'accumulate': work.microbatches,
      'remat': work.remat,
      **{name: name in work.fast_paths for name in work.fast_path_titles},
      'total_steps': work.steps,
      'parameter_bytes': work.parameter_bytes,
      'state_bytes': work.state_bytes,
      'state_bytes_per_device': work.state_bytes_per_device,
      'available_bytes': pod.generation.memory_bytes,
      **results,
    }

  def _shortage_numbers(self, shortage: Shortage) -> dict[str, Any]:
    available = self.pod.generation.memory_bytes
    return {
      'fits': False,
      'peak_bytes': shortage.needed,
      'lacking_bytes': shortage.needed - available,
      'largest_batch_per_device': shortage.largest_batch,
      'largest_batch_size': shortage.largest_batch * len(self.pod.devices),
      'largest_batch_settings': dict(shortage.settings),
      'tried_batch_per_device': list(shortage.tried),
    }

  def _costs(
    self, compiled: compilation.Compiled, schedule: costs.Schedule
  ) -> dict[str, Any]:
    work, devices = self.workload, len(self.pod.devices)
    sent = sum(each.sent for each in schedule.collectives)
    return {
      'fits': True,
      'peak_bytes': compiled.peak_bytes,
      'argument_bytes': compiled.argument_bytes,
      'temp_bytes': compiled.temp_bytes,
      'compile_s': compiled.seconds,
      'cached': compiled.cached,
      'flops_per_step': (
        compiled.flops * self._work_per_counted_work() * devices
      ),
      # The backward pass costs two forward passes; a multiply-add is two FLOPs.
      'model_flops_per_step': 6 * work.macs * work.batch,
      'step_cycles': schedule.cycles,
      **self._times(schedule.cycles),
      'collective_bytes': sum(each.payload for each in schedule.collectives),
      'collective_sent_bytes': sent,
      # The devices of a chip are summed first, so a chip sends this once.
      'collective_ms_by_bandwidth': 1e3 * sent / self.pod.generation.links,
      'unknown_loops': schedule.unknown_loops,
      'not_estimated': schedule.not_estimated,
      'cycles': {
        each.name: {'forward': each.forward, 'backward': each.backward}
        for each in schedule.categories
      },
    }

  def _work_per_counted_work(self) -> float:
    """Return the ratio of a step's work to the work that the compiler counts.

    The compiler counts one iteration of the loop over microbatches. SAM's
    ascent has a separate loop with the same cost per example; the update is
    outside of both loops and costs less than a hundredth.
    """
    work = self.workload
    descent, ascent = work.batch // len(self.pod.devices), work.sam_examples
    # As in `step.Trainer.gradients`.
    ascent_microbatches = math.gcd(work.microbatches, ascent)
    counted = descent / work.microbatches + ascent / ascent_microbatches
    return (descent + ascent) / counted

  def _times(self, cycles: int) -> dict[str, float | None]:
    work, kind = self.workload, self.pod.generation
    if kind.clock is None:
      return dict.fromkeys(_TIMES)
    seconds = cycles / kind.clock
    rate = work.batch / seconds
    flops = 6 * work.macs * rate / len(self.pod.devices)
    hours = work.steps * seconds / 3600
    assert self.overlap
    waits = [
      overlap.waiting(transfers, kind.clock / kind.links) / kind.clock
      for transfers in (self.overlap.scheduled, self.overlap.possible)
    ]
    return {
      'step_ms': 1e3 * seconds,
      'collective_ms_waited': 1e3 * waits[0],
      'collective_ms_waited_at_best': 1e3 * waits[1],
      'images_per_second': rate,
      'model_flops_utilisation': flops / kind.peak,
      'decoded_per_second_and_host': work.decoded * rate / self.pod.hosts,
      'epoch_minutes': work.examples and work.examples / rate / 60,
      'total_hours': hours,
      'chip_hours': hours * self.pod.chips,
    }
