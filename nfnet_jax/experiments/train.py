"""Trains a network, or resumes the run that a workdir holds.

python -m nfnet_jax.experiments.train --config=digits --workdir=/tmp/digits
"""

from collections.abc import Callable
import os
import pathlib

from absl import flags

from nfnet_jax.experiments import cli, errors, several

for _name in ('config', 'list_configs', 'workdir', 'json', *several.FLAGS):
  flags.declare_key_flag(_name)


Say = Callable[[str], None]


def main() -> int:
  from nfnet_jax.experiments import assemble, checks, describe
  from nfnet_jax.experiments import config as config_lib
  from nfnet_jax.training import processes

  workdir = cli.get_workdir()
  with several.together() as say:
    config = checks.resolve_to_train(cli.get_config(), workdir)
    checks.check_same_everywhere(config)
    checks.check_layout(config)
    if processes.is_primary():
      config_lib.check_same(config, workdir)
    experiment = assemble.Experiment.open(config)
    if processes.is_primary():
      say(describe.summary(experiment))
      config_lib.save(config, workdir, experiment.source.class_names)
    else:
      cli.say(describe.devices())
    return run(experiment, workdir, say)


def run(experiment, workdir: pathlib.Path, say: Say) -> int:
  """Trains, and says how it ended; returns the exit code."""
  from nfnet_jax.training import (
    curves,
    diagnosis,
    evaluation,
    interrupt,
    processes,
  )

  try:
    results = train(experiment, workdir, say)
  except interrupt.Interrupted:
    say(f'Interrupted and saved. The same command resumes from {workdir}.')
    return cli.EXIT_INTERRUPTED
  except diagnosis.NonFiniteError as error:
    say(f'nfnet_jax: {error}')
    return cli.EXIT_FAILED
  except OSError as error:
    raise errors.RunError(
      f'{error}. See to the disk of {workdir}; then the same command resumes '
      'from the last checkpoint that is there.'
    ) from error
  if processes.is_primary():
    if cli.JSON.value:
      print(evaluation.to_json(results, step=experiment.cadence.total))
    say(evaluation.report(results))
    say(f'curves     {curves.plot(workdir)}')
  return 0


def train(experiment, workdir: pathlib.Path, say: Say) -> dict[str, float]:
  """Runs or resumes an `assemble.Experiment`; returns its last evaluation."""
  from nfnet_jax.training import (
    checkpoint,
    interrupt,
    loop,
    metrics,
    parallel,
    processes,
    progress,
  )

  cadence, config = experiment.cadence, experiment.config
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
      ) as shown,
    ):
      note = shown.note if processes.is_primary() else cli.say
      return loop.Loop(
        trainer=experiment.trainer,
        parallel=parallel.DataParallel(),
        train_batches=lambda first: experiment.train_batches(first, note),
        eval_batches=lambda: experiment.eval_batches(note),
        cadence=cadence,
        checkpoints=checkpoints,
        writer=writer,
        progress=shown,
        stop=stop,
      ).run(state)


def _first_state(experiment, checkpoints, say: Say):
  """Restores or initialises the state in process 0, and gives it to all."""
  from nfnet_jax.training import checkpoint, processes

  like, state = experiment.abstract_state(), None
  if processes.is_primary():
    with errors.as_input_error(checkpoint.UnreadableError):
      state = checkpoints.restore_latest(like)
    if state is None:
      state = experiment.create_state()
    else:
      say(f'Resuming after step {int(state.step)}.')
  return processes.broadcast(state, like)


if __name__ == '__main__':
  cli.run(main)
