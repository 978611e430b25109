"""Trains a network, or resumes the run that a workdir holds.

python -m nfnet_jax.experiments.train --config=digits --workdir=/tmp/digits
"""

import pathlib

from absl import flags

from nfnet_jax.experiments import cli, errors

for _name in ('config', 'list_configs', 'workdir', 'json'):
  flags.declare_key_flag(_name)


def main() -> int:
  from nfnet_jax.experiments import assemble
  from nfnet_jax.experiments import config as config_lib
  from nfnet_jax.training import curves, diagnosis, evaluation, interrupt

  workdir = cli.get_workdir()
  config = assemble.resolve_and_check(cli.get_config())
  assemble.check_layout(config)
  config_lib.check_same(config, workdir)
  experiment = assemble.Experiment.open(config)
  cli.say(experiment.summary())
  config_lib.save(config, workdir, experiment.source.class_names)
  try:
    results = train(experiment, workdir)
  except interrupt.Interrupted:
    cli.say(f'Interrupted and saved. The same command resumes from {workdir}.')
    return cli.EXIT_INTERRUPTED
  except diagnosis.NonFiniteError as error:
    cli.say(f'nfnet_jax: {error}')
    return cli.EXIT_FAILED
  if cli.JSON.value:
    print(evaluation.to_json(results, step=experiment.cadence.total))
  cli.say(evaluation.report(results))
  cli.say(f'curves     {curves.plot(workdir)}')
  return 0


def train(experiment, workdir: pathlib.Path) -> dict[str, float]:
  """Runs or resumes an `assemble.Experiment`; returns its last evaluation."""
  from nfnet_jax.training import (
    checkpoint,
    interrupt,
    loop,
    metrics,
    parallel,
    progress,
  )

  cadence, config = experiment.cadence, experiment.config
  with (
    interrupt.StopRequest() as stop,
    checkpoint.Checkpoints(
      workdir / 'checkpoints', config.run.keep_checkpoints
    ) as checkpoints,
  ):
    with errors.as_input_error(checkpoint.UnreadableError):
      state = checkpoints.restore_latest(like=experiment.abstract_state())
    if state is None:
      state = experiment.create_state()
    else:
      cli.say(f'Resuming after step {int(state.step)}.')
    first = int(state.step)
    with (
      metrics.MetricsWriter(workdir, resumed_step=first) as writer,
      progress.Progress(first, cadence.total, config.batch_size) as shown,
    ):
      return loop.Loop(
        trainer=experiment.trainer,
        parallel=parallel.DataParallel(),
        train_batches=lambda first: experiment.train_batches(first, shown.note),
        eval_batches=lambda: experiment.eval_batches(shown.note),
        cadence=cadence,
        checkpoints=checkpoints,
        writer=writer,
        progress=shown,
        stop=stop,
      ).run(state)


if __name__ == '__main__':
  cli.run(main)
