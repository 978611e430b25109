"""Trains a network, or resumes the run that a workdir holds.

python -m nfnet_jax.experiments.train --config=digits --workdir=/tmp/digits
"""

import pathlib
import sys

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
  _say(experiment.summary())
  config_lib.save(config, workdir)
  try:
    results = train(experiment, workdir)
  except interrupt.Interrupted:
    _say(f'Interrupted and saved. The same command resumes from {workdir}.')
    return cli.EXIT_INTERRUPTED
  except diagnosis.NonFiniteError as error:
    _say(f'nfnet_jax: {error}')
    return cli.EXIT_FAILED
  if cli.JSON.value:
    print(evaluation.to_json(experiment.cadence.total, results))
  _say(evaluation.report(results))
  _say(f'curves     {curves.plot(workdir)}')
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
      _say(f'Resuming after step {int(state.step)}.')
    first = int(state.step)
    with (
      metrics.MetricsWriter(workdir, resumed_step=first) as writer,
      progress.Progress(first, cadence.total, config.batch_size) as shown,
    ):
      return loop.Loop(
        trainer=experiment.trainer,
        parallel=parallel.DataParallel(),
        train_batches=experiment.train_batches,
        eval_batches=experiment.eval_batches,
        cadence=cadence,
        checkpoints=checkpoints,
        writer=writer,
        progress=shown,
        stop=stop,
      ).run(state)


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


if __name__ == '__main__':
  cli.run(main)
