"""Trains a network, or resumes the run that a workdir holds.

python -m nfnet_jax.experiments.train --config=digits --workdir=/tmp/digits
"""

from collections.abc import Callable
import os

from absl import flags
from etils import epath

from nfnet_jax.experiments import cli, errors, naming, several, shared, tracing

for _name in (
  'config',
  'list_configs',
  'workdir',
  'json',
  *tracing.FLAGS,
  *several.FLAGS,
):
  flags.declare_key_flag(_name)


Say = Callable[[str], None]


def main() -> int:
  from nfnet_jax.experiments import assemble, checks, describe, workdirs
  from nfnet_jax.training import buckets, processes, programs

  workdir, traced = shared.get_workdir(), tracing.get_steps()
  with several.together() as say:
    with errors.as_input_error():
      kept = programs.keep()
    if processes.is_primary():
      with errors.of_storage():
        buckets.check(workdir, to_write=True)
    config = checks.resolve_to_train(naming.get_config(), workdir)
    checks.check_same_everywhere(config)
    checks.check_layout(config)
    if processes.is_primary():
      workdirs.check_same(config, workdir)
      tracing.check_begun(traced, workdir)
    experiment = assemble.Experiment.open(config)
    tracing.check_total(traced, experiment.cadence.total)
    if processes.is_primary():
      say(describe.summary(experiment, kept))
      workdirs.save(config, workdir, experiment.source.class_names)
    else:
      cli.say(describe.devices())
    return run(experiment, workdir, say, traced)


def run(
  experiment, workdir: epath.Path, say: Say, traced: range = range(0)
) -> int:
  """Trains, and says how it ended; returns the exit code."""
  from nfnet_jax.experiments import ending
  from nfnet_jax.training import (
    curves,
    diagnosis,
    evaluation,
    files,
    interrupt,
    processes,
  )

  try:
    finished = train(experiment, workdir, say, traced)
    picture = curves.plot(workdir) if processes.is_primary() else None
  except interrupt.Interrupted:
    return cli.EXIT_INTERRUPTED
  except diagnosis.NonFiniteError as error:
    say(f'nfnet_jax: {error}')
    return cli.EXIT_FAILED
  except OSError as error:
    place = workdir if files.is_in_bucket(workdir) else f'the disk of {workdir}'
    raise errors.RunError(
      f'{error}. See to {place}; then the same command resumes from the last '
      'checkpoint that is there.'
    ) from error
  if processes.is_primary():
    if shared.JSON.value:
      step = finished.cadence.total
      results = finished.writer.evaluations[step]
      more = ending.numbers(finished)
      print(evaluation.to_json(results, step=step, **more))
    say(ending.summary(finished, workdir))
    say(f'curves     {picture}')
  return 0


def train(experiment, workdir: epath.Path, say: Say, traced: range):
  """Runs or resumes an `assemble.Experiment`; returns the ended `loop.Loop`."""
  import jax

  from nfnet_jax.experiments import ending
  from nfnet_jax.training import (
    checkpoint,
    interrupt,
    loop,
    metrics,
    parallel,
    processes,
    profiling,
    progress,
    timing,
  )

  cadence, config = experiment.cadence, experiment.config
  watch = timing.Stopwatch()
  with (
    interrupt.StopRequest() as stop,
    (
      checkpoint.Checkpoints(
        workdir / 'checkpoints', config.run.keep_checkpoints
      )
      if processes.is_primary()
      else checkpoint.Elsewhere()
    ) as checkpoints,
  ):
    state = _first_state(experiment, checkpoints, say)
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
      note = shown.note if processes.is_primary() else cli.say
      # A run that resumes after them has their trace: `tracing.check_begun`.
      steps = traced if first <= traced.start else range(0)
      work = loop.Loop(
        trainer=experiment.trainer,
        sharded=experiment.sharded_trainer(jax.device_count()),
        parallel=parallel.DataParallel(),
        train_batches=lambda first: experiment.train_batches(first, note),
        eval_batches=lambda: experiment.eval_batches(note),
        cadence=cadence,
        checkpoints=checkpoints,
        writer=writer,
        progress=shown,
        stop=stop,
        tracer=profiling.Tracer(workdir, steps, note),
        watch=watch,
      )
      try:
        work.run(state)
      except interrupt.Interrupted:
        step = first + work.throughput.steps
        say(ending.interrupted(work, step, workdir))
        raise
  return work


def _first_state(experiment, checkpoints, say: Say):
  """Restores or initialises the state in process 0, and gives it to all."""
  from nfnet_jax.training import checkpoint, exchange, processes

  like, state = experiment.abstract_state(), None
  if processes.is_primary():
    with errors.as_input_error(checkpoint.UnreadableError):
      state = checkpoints.restore_latest(like)
    if state is None:
      state = experiment.create_state()
    else:
      say(f'Resuming after step {int(state.step)}.')
  return exchange.broadcast(state, like)


if __name__ == '__main__':
  cli.run(main)
