"""Plan a training step for a pod: its cost, or the largest batch that fits."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import dataclasses
import functools

import jax

from nfnet_jax.planning import (
  compilation,
  costs,
  estimate,
  largest_batch,
  plan_errors,
  topology,
)
from nfnet_jax.planning import workload as workload_lib


@dataclasses.dataclass(frozen=True)
class Planner:
  """Plans the training step of one workload on one pod.

  Attributes:
    workload: what is trained.
    pod: the devices to compile for.
    lower: maps a global batch size to the step, lowered for the pod's devices.
    accept: maps a batch per device that fits to the largest one up to it that
      training accepts, and to the settings that it needs.
    progress: maps a message to a context manager that shows it.
  """

  workload: workload_lib.Workload
  pod: topology.Pod
  lower: Callable[[int], jax.stages.Lowered]
  accept: Callable[[int], tuple[int, dict[str, int]]]
  progress: Callable[[str], contextlib.AbstractContextManager]

  def plan(self, effort: str) -> estimate.Plan:
    """Compile the step; if it does not fit, find the largest batch that does.

    Args:
      effort: see `compilation.EFFORTS`.
    """
    plan = self.attempt(effort)
    if not plan.shortage:
      return plan
    shortage = self._find_shortage(plan.shortage.needed)
    return dataclasses.replace(plan, shortage=shortage)

  def attempt(self, effort: str) -> estimate.Plan:
    """Compile the step; if it does not fit, say only what it needs.

    Args:
      effort: see `compilation.EFFORTS`.
    """
    plan = estimate.Plan(self.workload, self.pod, effort)
    try:
      compiled = self._compile(self.workload.batch, effort)
    except plan_errors.DoesNotFitError as error:
      shortage = estimate.Shortage(error.needed, 0, [])
      return dataclasses.replace(plan, shortage=shortage)
    schedule = costs.read(compiled.text, len(self.pod.devices))
    return dataclasses.replace(plan, compiled=compiled, schedule=schedule)

  def _compile(self, batch: int, effort: str) -> compilation.Compiled:
    message = (
      f'Compiling {self.workload.model} for {self.pod.name}, '
      f'{batch // len(self.pod.devices)} images per '
      f'{self.pod.generation.device} ({effort}) ...'
    )
    compiled = compilation.compile_step(
      self.lower(batch),
      self.pod.name,
      effort,
      progress=functools.partial(self.progress, message),
    )
    # With microbatches the compiler also accepts some programs that need more.
    available = self.pod.generation.memory_bytes
    if compiled.peak_bytes > available:
      raise plan_errors.DoesNotFitError(compiled.peak_bytes, available)
    return compiled

  def _find_shortage(self, needed: int) -> estimate.Shortage:
    """Search in steps of one example per microbatch and device."""
    microbatches = self.workload.microbatches
    unit = microbatches * len(self.pod.devices)
    available = self.pod.generation.memory_bytes

    def measure(size: int) -> int:
      try:
        # 'quick' needs the same memory.
        return self._compile(size * unit, 'quick').peak_bytes
      except plan_errors.DoesNotFitError as failure:
        return failure.needed

    largest, tried = largest_batch.largest_batch(
      self.workload.batch // unit, needed, available, measure
    )
    batch, settings = self.accept(largest * microbatches)
    return estimate.Shortage(
      needed=needed,
      largest_batch=batch,
      tried=[size * microbatches for size in tried],
      settings=settings,
    )
