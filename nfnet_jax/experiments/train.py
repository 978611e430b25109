"""Trains a network.

  python -m nfnet_jax.experiments.train --config=digits --workdir=/tmp/digits

Run the same command again to resume. `--list_configs` lists the experiments.
"""

import pathlib
import sys

from absl import flags

from nfnet_jax.experiments import cli
from nfnet_jax.experiments import errors

flags.adopt_module_key_flags(cli)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where the run writes; an existing run there is resumed.'
)


def main() -> int | None:
  from nfnet_jax.experiments import assemble
  from nfnet_jax.experiments import config as config_lib
  from nfnet_jax.training import curves
  from nfnet_jax.training import interrupt

  if not _WORKDIR.value:
    raise errors.InputError('Say where to write: --workdir=DIR.')
  workdir = pathlib.Path(_WORKDIR.value).resolve()
  config = assemble.resolve_and_check(cli.get_config())
  config_lib.check_same(config, workdir)
  experiment = assemble.Experiment.open(config)
  config_lib.save(config, workdir)
  try:
    results = train(experiment, workdir)
  except interrupt.Interrupted:
    _say(f'Interrupted; saved. The same command resumes from {workdir}.')
    return cli.EXIT_INTERRUPTED
  picture = curves.plot(workdir)
  for name in ('eval', 'eval_ema'):
    label = 'EMA' if name == 'eval_ema' else 'raw'
    _say(
      f'{label} weights: top-1 {100 * results[f"{name}/top1"]:.2f} %, top-5 '
      f'{100 * results[f"{name}/top5"]:.2f} %, loss '
      f'{results[f"{name}/loss"]:.4f} on {results[f"{name}/examples"]} images'
    )
  _say(f'curves     {picture}')


def train(experiment, workdir: pathlib.Path) -> dict[str, float]:
  """Runs or resumes an experiment; returns its last evaluation."""
  from nfnet_jax.training import checkpoint
  from nfnet_jax.training import interrupt
  from nfnet_jax.training import loop
  from nfnet_jax.training import metrics
  from nfnet_jax.training import parallel
  from nfnet_jax.training import progress

  _say(experiment.summary())
  cadence, config = experiment.cadence, experiment.config
  with (
    interrupt.StopRequest() as stop,
    checkpoint.Checkpoints(
      workdir / 'checkpoints', config.run.keep_checkpoints
    ) as checkpoints,
  ):
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
