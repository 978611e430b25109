"""Train a network, or resume the run of a workdir.

python -m nfnet_jax.experiments.train --config=digits --workdir=/tmp/digits
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os
from typing import TYPE_CHECKING

from absl import flags
from etils import epath

from nfnet_jax import errors
from nfnet_jax.cli import command, common_flags, config_flag, profile, session
from nfnet_jax.storage import failures, files, lock, run_files

if TYPE_CHECKING:
  from nfnet_jax.config import experiment as experiment_lib
  from nfnet_jax.training import checkpoint, loop, timing
  from nfnet_jax.training import state as state_lib

for _name in (
  *config_flag.FLAGS,
  'workdir',
  'json',
  *profile.FLAGS,
  *session.FLAGS,
):
  flags.declare_key_flag(_name)


def main() -> int:
  """Train `--config` in `--workdir`, and return the exit code."""
  from nfnet_jax.cli import summary
  from nfnet_jax.config import validate
  from nfnet_jax.config import workdir as workdir_lib
  from nfnet_jax.distributed import collectives, compilation_cache, processes
  from nfnet_jax.storage import buckets
  from nfnet_jax.training import timing

  stopwatch = timing.Stopwatch()
  workdir, traced = common_flags.get_workdir(), profile.get_steps()
  with session.distributed_session() as log:
    cache_folder = compilation_cache.enable_compilation_cache()
    with collectives.failing_together(), failures.as_command_error():
      if processes.is_primary():
        buckets.check(workdir, to_write=True)
        files.check_writable(workdir)
    experiment = session.open_experiment(workdir=workdir)
    warnings = []
    with collectives.failing_together():
      profile.check_total(traced, experiment.cadence.total)
      if processes.is_primary():
        profile.check_not_passed(traced, workdir)
        if not workdir_lib.is_run(workdir):
          validate.check_run(experiment.config, experiment.units)
          warnings = experiment.check_data()
    with locked(workdir):
      with collectives.failing_together():
        if processes.is_primary():
          log(summary.summary(experiment, cache_folder))
          for line in warnings:
            log(f'warning    {line}')
          class_names = experiment.source.class_names
          workdir_lib.save(experiment.config, workdir, class_names)
        else:
          command.log(summary.devices())
      return run(experiment, workdir, log, traced, stopwatch)


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
  """Lock the workdir in process 0; fail in all if another run has locked it."""
  from nfnet_jax.distributed import collectives, processes

  with contextlib.ExitStack() as stack:
    with collectives.failing_together(), failures.as_command_error():
      if processes.is_primary():
        stack.enter_context(lock.lock_folder(workdir))
    yield


def run(
  experiment: experiment_lib.Experiment,
  workdir: epath.Path,
  log: command.LogFn,
  traced: range = range(0),
  stopwatch: timing.Stopwatch | None = None,
) -> int:
  """Train, log how it ended, and return the exit code."""
  from nfnet_jax.cli import results
  from nfnet_jax.distributed import preemption, processes
  from nfnet_jax.training import curves, evaluation, nonfinite

  try:
    finished = train(experiment, workdir, log, traced, stopwatch)
    picture = curves.plot(workdir) if processes.is_primary() else None
  except preemption.Interrupted:
    return command.EXIT_INTERRUPTED
  except nonfinite.NonFiniteError as error:
    log(f'nfnet_jax: {error}')
    return command.EXIT_FAILED
  except OSError as error:
    place = workdir if files.is_in_bucket(workdir) else f'the disk of {workdir}'
    raise errors.RunError(
      f'{error}. Check {place}. Then the same command resumes from the last '
      'checkpoint.'
    ) from error
  if processes.is_primary():
    if common_flags.JSON.value:
      step = finished.cadence.total
      metrics = finished.writer.evaluations[step]
      more = results.numbers(finished)
      print(evaluation.to_json(metrics, step=step, **more))
    log(results.summary(finished, workdir))
    log(f'curves     {picture}')
  return 0


def train(
  experiment: experiment_lib.Experiment,
  workdir: epath.Path,
  log: command.LogFn,
  traced: range,
  stopwatch: timing.Stopwatch | None,
) -> loop.Loop:
  """Start or resume a run, and return its loop once it has ended."""
  import jax

  from nfnet_jax.cli import results
  from nfnet_jax.distributed import preemption, processes
  from nfnet_jax.training import (
    checkpoint,
    data_parallel,
    goodput,
    loop,
    metrics,
    profiling,
    progress,
    timing,
  )

  cadence, config = experiment.cadence, experiment.config
  stopwatch = stopwatch or timing.Stopwatch()
  with (
    preemption.StopRequest() as stop,
    checkpoint.quiet_orbax(),
    (
      checkpoint.Checkpoints(
        workdir / run_files.CHECKPOINTS, config.run.keep_checkpoints
      )
      if processes.is_primary()
      else checkpoint.NullCheckpoints()
    ) as checkpoints,
  ):
    trainer = experiment.trainer_on(jax.device_count())
    parallel = data_parallel.DataParallel()
    state = _first_state(experiment, checkpoints, log)
    first = int(state.step)
    # The same name, so that the state on the host is freed.
    state = parallel.shard_state(trainer.layout, state)
    with (
      metrics.MetricsWriter(workdir, resumed_step=first) as writer,
      open(os.devnull, 'w') as nowhere,
      progress.Progress(
        first,
        cadence.total,
        config.batch_size,
        None if processes.is_primary() else nowhere,
        devices=jax.device_count() if processes.are_several() else 1,
      ) as shown,
    ):
      log_fn = shown.log if processes.is_primary() else command.log
      if writer.missing_steps:
        log_fn(f'metrics.jsonl lacks {writer.missing_steps:,} earlier steps.')
      # A run that resumes after these steps has traced them; see
      # `profile.check_not_passed`.
      steps = traced if first <= traced.start else range(0)
      running = loop.Loop(
        trainer=trainer,
        parallel=parallel,
        train_batches=lambda first: experiment.train_batches(first, log_fn),
        eval_batches=lambda: experiment.eval_batches(log_fn),
        cadence=cadence,
        checkpoints=checkpoints,
        writer=writer,
        progress=shown,
        stop=stop,
        tracer=profiling.Tracer(workdir, steps, log_fn),
        stopwatch=stopwatch,
        goodput=goodput.Goodput(
          workdir if processes.is_primary() else '', first, stopwatch
        ),
      )
      try:
        running.run(state, first)
      except preemption.Interrupted:
        step = first + running.throughput.steps
        log(results.interrupted(running, step, workdir))
        raise
      if running.throughput.steps:
        running.goodput.record(cadence.total)
  return running


def _first_state(
  experiment: experiment_lib.Experiment,
  checkpoints: checkpoint.Checkpoints | checkpoint.NullCheckpoints,
  log: command.LogFn,
) -> state_lib.TrainState:
  """Restore or initialise the state in process 0, and send it to all.

  The state is on the host, so that each device later holds only one copy.
  """
  import jax

  from nfnet_jax.distributed import collectives, processes
  from nfnet_jax.training import checkpoint

  abstract_state, state = experiment.abstract_state(), None
  with (
    collectives.failing_together(),
    errors.as_input_error(checkpoint.UnreadableError),
  ):
    if processes.is_primary():
      state = checkpoints.restore_latest(abstract_state)
      if state is None:
        state = jax.device_get(experiment.create_state())
      else:
        log(f'Resuming after step {int(state.step)}.')
  return collectives.broadcast(state, abstract_state)


if __name__ == '__main__':
  command.run(main)
