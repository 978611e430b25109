"""The training loop: steps, logs, evaluations, checkpoints, interruptions."""

import collections
from collections.abc import Callable, Iterator, Mapping
import dataclasses
import itertools

import jax
import numpy as np

from nfnet_jax.distributed import collectives, preemption, processes
from nfnet_jax.training import checkpoint as checkpoint_lib
from nfnet_jax.training import (
  data_parallel,
  evaluation,
  nonfinite,
  profiling,
  sharded_update,
  timing,
)
from nfnet_jax.training import metrics as metrics_lib
from nfnet_jax.training import progress as progress_lib
from nfnet_jax.training import state as state_lib
from nfnet_jax.training import step as step_lib

Batch = Mapping[str, np.ndarray]

# Batches placed on the devices before they are needed, and steps dispatched
# before the host waits for one: enough to hide the host, little to hold.
_BATCHES_AHEAD = 2
_STEPS_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Cadence:
  """How long a run is and when it looks up, in steps, fractions allowed.

  All of them also happen after the last step.
  """

  total: int
  log: float
  evaluate: float
  checkpoint: float


@dataclasses.dataclass
class Loop:
  """A run in progress.

  Attributes:
    trainer: what a step does.
    sharded: the same with the update sharded over the devices; None for the
      update by each of them.
    parallel: where it runs.
    train_batches: first step -> this process's batches from there on.
    eval_batches: -> this process's padded evaluation batches.
    cadence: see `Cadence`.
    checkpoints: where state goes.
    writer: where metrics go.
    progress: what the person sees.
    stop: asks the run to end.
    tracer: takes a profiler trace of some steps.
    watch: what the time goes to.
    throughput: images a second.
  """

  trainer: step_lib.Trainer
  parallel: data_parallel.DataParallel
  train_batches: Callable[[int], Iterator[Batch]]
  eval_batches: Callable[[], Iterator[Batch]]
  cadence: Cadence
  checkpoints: checkpoint_lib.Checkpoints
  writer: metrics_lib.MetricsWriter
  progress: progress_lib.Progress
  stop: preemption.StopRequest
  sharded: sharded_update.ShardedTrainer | None = None
  tracer: profiling.Tracer = dataclasses.field(default_factory=profiling.Tracer)
  watch: timing.Stopwatch = dataclasses.field(default_factory=timing.Stopwatch)
  throughput: timing.Throughput = dataclasses.field(init=False)

  def __post_init__(self):
    self.throughput = timing.Throughput(self.watch, self.trainer.global_batch)
    self._train_step = self._compiling_first(
      self.parallel.train_step(self._updating)
    )
    self._collect = self.parallel.collector(self._updating)
    self._eval_step = self._compiling_first(
      self.parallel.eval_step(evaluation.evaluator(self.trainer.model))
    )
    # Metrics still on the devices: (updates made, metrics).
    self._pending = collections.deque()
    self._last_batch = None
    self._failure = None  # Of this process's data; the others go on.
    self._last_row = None

  @property
  def _updating(self) -> step_lib.Trainer | sharded_update.ShardedTrainer:
    return self.sharded or self.trainer

  def run(self, state: state_lib.TrainState) -> dict[str, float]:
    """Trains from `state` to the end.

    Args:
      state: of host or device arrays; not kept.

    Returns:
      The metrics of the last evaluation.

    Raises:
      preemption.Interrupted: if asked to stop; the state is saved.
      nonfinite.NonFiniteError: if loss, gradient or learning rate ceased to
        be finite; the last good state is saved.
    """
    step = int(state.step)
    state = self.parallel.distribute(self._updating, state)
    batches = self._place(self.train_batches(step))
    if step < self.cadence.total:
      self.progress.log('Compiling the training step ...')
    # Without the end of the pipeline, which takes seconds.
    with self.watch.during(timing.TRAINING), self.tracer:
      try:
        while True:
          self._look_up(state, step)
          if step == self.cadence.total:
            break
          state = self._step(batches, state, step)
          step += 1
          with self.watch.during(timing.SAVING):
            self.tracer.end_at(step, state)
      except preemption.Interrupted:
        self._save(state)
        self._wait_until_saved()
        raise
      self._wait_until_saved()
    return self.writer.evaluations[step]

  def _step(
    self, batches: Iterator[Batch], state: state_lib.TrainState, step: int
  ) -> state_lib.TrainState:
    """Makes the update after `step`; logs the one before, where that is due."""
    self.tracer.begin_at(step, state)
    with self.tracer.annotate(step):
      batch = self._next(batches, state)
      state, metrics = self._train_step(state, batch)
    self._pending.append((step + 1, metrics))
    self._hold_back()
    # A step late, so that the wait is for a step already done.
    if self._due(step, self.cadence.log):
      self._flush(state, keep=1)
      self._show()
    return state

  def _compiling_first(self, step: Callable) -> Callable:
    """Counts the first call of a step as compiling, and waits for it."""
    calls = itertools.count()

    def call(*args):
      if next(calls):
        return step(*args)
      with self.watch.during(timing.COMPILING):
        return jax.block_until_ready(step(*args))

    return call

  def _place(self, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Keeps the next batches on the devices."""
    ahead = collections.deque()
    for batch in batches:
      ahead.append(self.parallel.split(batch))
      if len(ahead) > _BATCHES_AHEAD:
        yield ahead.popleft()

  def _next(self, batches: Iterator[Batch], state: state_lib.TrainState):
    """Returns the next batch; if the data fails, no step is lost.

    Of several processes none can save without the others. One whose data failed
    goes on with a batch that no step applies, until all find that out.
    """
    if self._failure:
      return self._last_batch
    begun = self.throughput.steps or self._pending
    try:
      with self.watch.during(timing.DATA if begun else timing.OTHER):
        self._last_batch = next(batches)
    except Exception as error:
      if not processes.are_several():
        self._save(state)
        self._wait_until_saved()
        raise
      if self._last_batch is None:
        raise
      self._failure = error
      no_step = self.parallel.split({'step': np.int32(-1)})
      self._last_batch = {**self._last_batch, **no_step}
    return self._last_batch

  def _hold_back(self) -> None:
    """Bounds the batches that wait on the devices; no step waits for this."""
    if len(self._pending) > _STEPS_AHEAD:
      jax.block_until_ready(self._pending[-1 - _STEPS_AHEAD][1])

  def _look_up(self, state: state_lib.TrainState, step: int) -> None:
    """Between two steps: evaluates, saves, stops, where that is due.

    A resumed run starts here, so that an evaluation that was interrupted is
    made up for.
    """
    evaluated = step in self.writer.evaluations
    if self._due(step, self.cadence.evaluate) and not evaluated:
      self._evaluate(state, step)
    if self._due(step, self.cadence.checkpoint):
      self._save(state)
    self._stop_if_asked()

  def _due(self, step: int, every: float) -> bool:
    """Whether a multiple of `every` lies in (step - 1, step], or at the end."""
    passed = step > 0 and step // every > (step - 1) // every
    return passed or step == self.cadence.total

  def _flush(self, state: state_lib.TrainState, keep: int = 0) -> None:
    """Fetches and writes all pending metrics but the newest `keep`."""
    count = len(self._pending) - keep
    fetched = jax.device_get([self._pending.popleft() for _ in range(count)])
    rows = []
    for step, metrics in fetched:
      row = {'step': step, **{k: float(v) for k, v in metrics.items()}}
      if not row.pop('applied'):
        self.writer.write(rows)
        self._explain_refusal(state)
      rows.append(row)
    self.writer.write(rows)
    self.throughput.steps += count
    if rows:
      self._last_row = rows[-1]

  def _show(self) -> None:
    if self._last_row:
      step, speed = self._last_row['step'], self.throughput.lap()
      self.writer.observe(step, speed)
      self.progress.update(step, self._last_row | speed)

  def _explain_refusal(self, state: state_lib.TrainState) -> None:
    """Saves the last good state and raises what broke the step after it."""
    self._store(state)
    self._wait_until_saved()
    # Asked once the first process has saved, which a failure would end.
    have_data = collectives.all_true(self._failure is None)
    if self._failure:
      raise self._failure
    if not have_data:
      processes.await_failure()
    state = self._collect(state)
    bad_batch = next(self.train_batches(int(state.step)))
    raise nonfinite.diagnose(self.trainer, self.parallel, state, bad_batch)

  def _evaluate(self, state: state_lib.TrainState, step: int) -> None:
    self._flush(state)
    if step == self.cadence.total:
      self._show()
    with self.watch.during(timing.EVALUATING):
      results = evaluation.evaluate(
        self._eval_step,
        self.parallel,
        evaluation.weights_of(self._collect(state)),
        self.eval_batches(),
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

  def _save(self, state: state_lib.TrainState) -> None:
    self._flush(state)
    self._store(state)

  def _store(self, state: state_lib.TrainState) -> None:
    """Saves a state, once its rows are where those who resume look."""
    with self.watch.during(timing.SAVING):
      self.writer.publish()
      self.checkpoints.save(self._collect(state))

  def _wait_until_saved(self) -> None:
    with self.watch.during(timing.SAVING):
      self.checkpoints.wait()

  def _stop_if_asked(self) -> None:
    if self.stop.poll():
      raise preemption.Interrupted
