"""The training loop: steps, logs, evaluations, checkpoints, interruptions."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nfnet_jax.distributed import collectives, preemption, processes
from nfnet_jax.training import checkpoint as checkpoint_lib
from nfnet_jax.training import (
  data_parallel,
  evaluation,
  goodput,
  nonfinite,
  profiling,
  timing,
)
from nfnet_jax.training import metrics as metrics_lib
from nfnet_jax.training import progress as progress_lib
from nfnet_jax.training import state as state_lib
from nfnet_jax.training import step as step_lib

Batch = Mapping[str, np.ndarray]

# Batches placed on the devices before they are needed, and steps dispatched
# before the host waits for one: enough to hide the host's work, and little
# memory.
_BATCHES_AHEAD = 2
_STEPS_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Cadence:
  """Length of a run, and intervals of its actions, in steps or fractions.

  All actions also happen after the last step.

  Attributes:
    total: steps of the run.
    log: interval of log lines.
    evaluate: interval of evaluations.
    checkpoint: interval of checkpoints.
  """

  total: int
  log: float
  evaluate: float
  checkpoint: float


@dataclasses.dataclass
class Loop:
  """A run in progress.

  Attributes:
    trainer: the training step.
    parallel: devices that it runs on.
    train_batches: returns this process's batches from a step on.
    eval_batches: returns this process's padded evaluation batches.
    cadence: length of the run and intervals of its actions.
    checkpoints: where states are saved.
    writer: where metrics are written.
    progress: where progress is shown.
    stop: records requests to stop the run.
    tracer: takes a profiler trace of some steps.
    stopwatch: measures the time per activity.
    goodput: records the time of all starts of the run.
    throughput: measures images per second.
  """

  trainer: step_lib.Trainer
  parallel: data_parallel.DataParallel
  train_batches: Callable[[int], Iterator[Batch]]
  eval_batches: Callable[[], Iterator[Batch]]
  cadence: Cadence
  checkpoints: checkpoint_lib.Checkpoints | checkpoint_lib.NullCheckpoints
  writer: metrics_lib.MetricsWriter
  progress: progress_lib.Progress
  stop: preemption.StopRequest
  tracer: profiling.Tracer = dataclasses.field(default_factory=profiling.Tracer)
  stopwatch: timing.Stopwatch = dataclasses.field(
    default_factory=timing.Stopwatch
  )
  goodput: goodput.Goodput = dataclasses.field(default_factory=goodput.Goodput)
  throughput: timing.Throughput = dataclasses.field(init=False)

  def __post_init__(self) -> None:
    self.throughput = timing.Throughput(
      self.stopwatch, self.trainer.global_batch
    )
    self._train_step = self._time_compilation(
      self.parallel.train_step(self.trainer)
    )
    self._gather_state = self.parallel.gather_state(self.trainer.layout)
    self._eval_step = self._time_compilation(
      self.parallel.eval_step(evaluation.evaluator(self.trainer.model))
    )
    # Metrics still on the devices: (updates made, metrics).
    self._pending: collections.deque[tuple[int, Any]] = collections.deque()
    self._last_batch: dict[str, jax.Array] | None = None
    # An error in this process's data, while other processes continue.
    self._data_error: Exception | None = None
    self._last_row: metrics_lib.Row | None = None

  def run(self, state: state_lib.TrainState, step: int) -> Mapping[str, float]:
    """Train from `state` to the end.

    Args:
      state: placed by `parallel.shard_state`; its buffers are donated.
      step: number of its updates.

    Returns:
      The metrics of the last evaluation.

    Raises:
      preemption.Interrupted: if the run was asked to stop; the state is saved.
      nonfinite.NonFiniteError: if loss, gradient or learning rate became
        non-finite; the last good state is saved.
    """
    batches = self._prefetch(self.train_batches(step), step)
    if step < self.cadence.total:
      self.progress.log('Compiling the training step ...')
    # Closing the data pipeline, which takes seconds, is outside.
    with self.stopwatch.during(timing.TRAINING), self.tracer:
      try:
        while True:
          self._run_due_actions(state, step)
          if step == self.cadence.total:
            break
          state = self._step(batches, state, step)
          step += 1
          with self.stopwatch.during(timing.SAVING):
            self.tracer.end_at(step, state)
      except preemption.Interrupted:
        self._save(state)
        self._wait_until_saved()
        raise
      self._wait_until_saved()
    return self.writer.evaluations[step]

  def _step(
    self, batches: Iterator[dict[str, jax.Array]], state: Any, step: int
  ) -> Any:
    """Make the update after `step`; log the one before it, if that is due."""
    self.tracer.begin_at(step, state)
    with self.tracer.annotate(step):
      batch = self._next_batch(batches, state, step)
      state, metrics = self._train_step(state, batch)
    self._pending.append((step + 1, metrics))
    self._throttle_dispatch()
    # One step late, so that the host waits for a step that is already done.
    if self._is_due(step, self.cadence.log):
      self._flush(state, keep=1)
      self._show_progress()
    return state

  def _time_compilation(self, step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a step so that its first call counts as compiling and is awaited."""
    calls = itertools.count()

    def call(*args):
      if next(calls):
        return step(*args)
      with self.stopwatch.during(timing.COMPILING):
        return jax.block_until_ready(step(*args))

    return call

  def _prefetch(
    self, batches: Iterator[Batch], first: int
  ) -> Iterator[dict[str, jax.Array]]:
    """Place the batches from step `first` on, before they are needed."""
    placed: collections.deque[dict[str, jax.Array]] = collections.deque()
    for step, batch in enumerate(batches, first):
      # Otherwise processes could apply the batches of different steps.
      if batch['step'] != step:
        raise RuntimeError(f'Step {step} got the batch of {batch["step"]}.')
      placed.append(self.parallel.shard_batch(batch))
      if len(placed) > _BATCHES_AHEAD:
        yield placed.popleft()

  def _next_batch(
    self, batches: Iterator[dict[str, jax.Array]], state: Any, step: int
  ) -> dict[str, jax.Array]:
    """Return the next batch; if the data fails, save the state first.

    All processes must take part in a save. A process whose data failed
    continues with a batch whose loss is not finite, so that no step is applied
    and all processes stop at the same step.
    """
    if self._data_error and self._last_batch:
      return self._last_batch
    begun = self.throughput.steps or self._pending
    try:
      with self.stopwatch.during(timing.DATA if begun else timing.OTHER):
        batch = next(batches)
    except Exception as error:
      if not processes.are_several():
        self._save(state)
        self._wait_until_saved()
        raise
      self._data_error = error
    if self._last_batch is None:  # No process can continue without one.
      collectives.raise_together(self._data_error)
    elif self._data_error:
      batch = self._without_loss(self._last_batch, step)
    self._last_batch = batch
    return batch

  def _without_loss(
    self, batch: dict[str, jax.Array], step: int
  ) -> dict[str, jax.Array]:
    """Return a batch of a step with the images of another and a loss of NaN."""
    weight = batch['weight']
    return {
      **batch,
      **self.parallel.shard_batch({'step': np.asarray(step, np.int32)}),
      'weight': jnp.full_like(weight, jnp.nan, device=weight.sharding),
    }

  def _throttle_dispatch(self) -> None:
    """Wait for an earlier step if too many are dispatched, to bound memory."""
    if len(self._pending) > _STEPS_AHEAD:
      jax.block_until_ready(self._pending[-1 - _STEPS_AHEAD][1])

  def _run_due_actions(self, state: Any, step: int) -> None:
    """Evaluate, save and stop between two steps, whichever of them is due.

    A resumed run starts here, so that it repeats an interrupted evaluation.
    """
    evaluated = step in self.writer.evaluations
    if self._is_due(step, self.cadence.evaluate) and not evaluated:
      self._evaluate(state, step)
    if self._is_due(step, self.cadence.checkpoint):
      self._save(state)
    self._stop_if_asked()

  def _is_due(self, step: int, every: float) -> bool:
    """Return whether (step - 1, step] has a multiple of `every` or the end."""
    passed = step > 0 and step // every > (step - 1) // every
    return passed or step == self.cadence.total

  def _flush(self, state: Any, keep: int = 0) -> None:
    """Fetch and write all pending metrics but the newest `keep`."""
    count = len(self._pending) - keep
    fetched = jax.device_get([self._pending.popleft() for _ in range(count)])
    rows: list[metrics_lib.Row] = []
    for step, metrics in fetched:
      row = {'step': step, **{k: float(v) for k, v in metrics.items()}}
      if not row.pop('applied'):
        self.writer.write(rows)
        self._raise_nonfinite(state)
      rows.append(row)
    self.writer.write(rows)
    self.throughput.steps += count
    if rows:
      self._last_row = rows[-1]

  def _show_progress(self) -> None:
    if self._last_row:
      step, speed = int(self._last_row['step']), self.throughput.lap()
      self.goodput.record(step, publish=False)
      self.writer.observe(step, speed | self.goodput.shares())
      self.progress.update(step, self._last_row | speed)

  def _raise_nonfinite(self, state: Any) -> None:
    """Save the last good state and raise the cause of the step's failure."""
    self._write_checkpoint(state)
    self._wait_until_saved()
    collectives.raise_together(self._data_error)
    state = self._gather_state(state)
    bad_batch = next(self.train_batches(int(state.step)))
    raise nonfinite.diagnose(self.trainer, self.parallel, state, bad_batch)

  def _evaluate(self, state: Any, step: int) -> None:
    self._flush(state)
    if step == self.cadence.total:
      self._show_progress()
    with self.stopwatch.during(timing.EVALUATING):
      results = evaluation.evaluate(
        self._eval_step,
        self.parallel,
        evaluation.weights_of(self._gather_state(state)),
        self._eval_batches(state),
        poll=self._stop_if_asked,
      )
    self.writer.write([{'step': step, **results}])
    self.writer.publish()
    self.progress.log(
      f'evaluation at step {step}: '
      f'top-1 {100 * results["eval/top1"]:.2f}% raw, '
      f'{100 * results["eval_ema/top1"]:.2f}% EMA '
      f'({results["eval/examples"]} images)'
    )

  def _eval_batches(self, state: Any) -> Iterator[Batch]:
    """Yield the evaluation's batches; if the data fails, save the state first.

    A failure in one process raises in all of them, so that all take part in the
    save.
    """
    batches = self.eval_batches()
    while True:
      batch = error = None
      try:
        batch = next(batches, None)
      except Exception as raised:
        error = raised
      if any(collectives.all_gather(error is not None)):
        self._save(state)
        self._wait_until_saved()
        collectives.raise_together(error)  # Once process 0 has saved.
      if batch is None:
        return
      yield batch

  def _save(self, state: Any) -> None:
    self._flush(state)
    self._write_checkpoint(state)

  def _write_checkpoint(self, state: Any) -> None:
    """Save a state, after the rows that a resumed run needs."""
    with self.stopwatch.during(timing.SAVING):
      self.writer.publish()
      self.checkpoints.save(self._gather_state(state))
      self._record_time()

  def _wait_until_saved(self) -> None:
    with self.stopwatch.during(timing.SAVING):
      self.checkpoints.wait()
    self._record_time()

  def _record_time(self) -> None:
    if self._last_row:
      self.goodput.record(int(self._last_row['step']))

  def _stop_if_asked(self) -> None:
    if self.stop.poll():
      raise preemption.Interrupted
