"""Trains a network, or resumes the run that a workdir holds.

python -m nfnet_jax.experiments.train --config=digits --workdir=/tmp/digits
"""

from collections.abc import Callable
import os

from absl import flags
from etils import epath

from nfnet_jax import errors
from nfnet_jax.cli import command, common_flags, profile, session
from nfnet_jax.config import lookup
from nfnet_jax.storage import failures

for _name in (
  'config',
  'list_configs',
  'workdir',
  'json',
  *profile.FLAGS,
  *session.FLAGS,
):
  flags.declare_key_flag(_name)


LogFn = Callable[[str], None]


def main() -> int:
  from nfnet_jax.cli import summary
  from nfnet_jax.config import experiment as experiment_lib
  from nfnet_jax.config import validate
  from nfnet_jax.config import workdir as workdir_lib
  from nfnet_jax.distributed import compilation_cache, processes
  from nfnet_jax.storage import buckets

  workdir, traced = common_flags.get_workdir(), profile.get_steps()
  with session.distributed_session() as log:
    with errors.as_input_error():
      kept = compilation_cache.enable_compilation_cache()
    if processes.is_primary():
      with failures.as_command_error():
        buckets.check(workdir, to_write=True)
    config = validate.resolve_to_train(lookup.get_config(), workdir)
    validate.check_same_everywhere(config)
    validate.check_layout(config)
    if processes.is_primary():
      workdir_lib.check_same(config, workdir)
      profile.check_begun(traced, workdir)
    experiment = experiment_lib.Experiment.open(config)
    profile.check_total(traced, experiment.cadence.total)
    if processes.is_primary():
      log(summary.summary(experiment, kept))
      workdir_lib.save(config, workdir, experiment.source.class_names)
    else:
      command.log(summary.devices())
    return run(experiment, workdir, log, traced)


def run(
  experiment, workdir: epath.Path, log: LogFn, traced: range = range(0)
) -> int:
  """Trains, and says how it ended; returns the exit code."""
  from nfnet_jax.cli import results
  from nfnet_jax.distributed import preemption, processes
  from nfnet_jax.storage import files
  from nfnet_jax.training import curves, evaluation, nonfinite

  try:
    finished = train(experiment, workdir, log, traced)
    picture = curves.plot(workdir) if processes.is_primary() else None
  except preemption.Interrupted:
    return command.EXIT_INTERRUPTED
  except nonfinite.NonFiniteError as error:
    log(f'nfnet_jax: {error}')
    return command.EXIT_FAILED
  except OSError as error:
    place = workdir if files.is_in_bucket(workdir) else f'the disk of {workdir}'
    raise errors.RunError(
      f'{error}. See to {place}; then the same command resumes from the last '
      'checkpoint that is there.'
    ) from error
  if processes.is_primary():
    if common_flags.JSON.value:
      step = finished.cadence.total
      results = finished.writer.evaluations[step]
      more = results.numbers(finished)
      print(evaluation.to_json(results, step=step, **more))
    log(results.summary(finished, workdir))
    log(f'curves     {picture}')
  return 0


def train(experiment, workdir: epath.Path, log: LogFn, traced: range):
  """Runs or resumes an `experiment_lib.Experiment`; returns the ended `loop.Loop`."""
  import jax

  from nfnet_jax.cli import results
  from nfnet_jax.distributed import preemption, processes
  from nfnet_jax.training import (
    checkpoint,
    data_parallel,
    loop,
    metrics,
    profiling,
    progress,
    timing,
  )

  cadence, config = experiment.cadence, experiment.config
  stopwatch = timing.Stopwatch()
  with (
    preemption.StopRequest() as stop,
    checkpoint.quiet_orbax(),
    (
      checkpoint.Checkpoints(
        workdir / 'checkpoints', config.run.keep_checkpoints
      )
      if processes.is_primary()
      else checkpoint.NullCheckpoints()
    ) as checkpoints,
  ):
    state = _first_state(experiment, checkpoints, log)
    first = int(state.step)
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
      note = shown.log if processes.is_primary() else command.log
      # A run that resumes after them has their trace: `profile.check_begun`.
      steps = traced if first <= traced.start else range(0)
      work = loop.Loop(
        trainer=experiment.trainer,
        sharded=experiment.sharded_trainer(jax.device_count()),
        parallel=data_parallel.DataParallel(),
        train_batches=lambda first: experiment.train_batches(first, note),
        eval_batches=lambda: experiment.eval_batches(note),
        cadence=cadence,
        checkpoints=checkpoints,
        writer=writer,
        progress=shown,
        stop=stop,
        tracer=profiling.Tracer(workdir, steps, note),
        stopwatch=stopwatch,
      )
      try:
        work.run(state)
      except preemption.Interrupted:
        step = first + work.throughput.steps
        log(results.interrupted(work, step, workdir))
        raise
  return work


def _first_state(experiment, checkpoints, log: LogFn):
  """Restores or initialises the state in process 0, and gives it to all."""
  from nfnet_jax.distributed import collectives, processes
  from nfnet_jax.training import checkpoint

  like, state = experiment.abstract_state(), None
  if processes.is_primary():
    with errors.as_input_error(checkpoint.UnreadableError):
      state = checkpoints.restore_latest(like)
    if state is None:
      state = experiment.create_state()
    else:
      log(f'Resuming after step {int(state.step)}.')
  return collectives.broadcast(state, like)


if __name__ == '__main__':
  command.run(main)
