"""Evaluates a run's latest checkpoint: raw and averaged weights.

  python -m nfnet_jax.experiments.evaluate --workdir=/tmp/digits

Without `--config` the run's own settings hold; with it, those under `run` may
differ. `--json` prints one object: `step`, `examples`, and `loss`, `top1`,
`top5` of the raw weights and, with the prefix `ema_`, of the averaged ones.
"""

import json
import pathlib

from absl import flags

from nfnet_jax.experiments import cli, errors

for _name in ('config', 'workdir', 'json'):
  flags.declare_key_flag(_name)


def main() -> None:
  from nfnet_jax.experiments import assemble
  from nfnet_jax.experiments import config as config_lib
  from nfnet_jax.training import evaluation
  from nfnet_jax.training import parallel as parallel_lib

  workdir = cli.get_workdir()
  given = cli.get_config() if cli.has_config() else config_lib.load(workdir)
  config = assemble.resolve_and_check(given)
  config_lib.check_same(config, workdir)
  experiment = assemble.Experiment.open(config)
  state = _restore_latest(workdir, experiment)
  parallel = parallel_lib.DataParallel()
  results = evaluation.evaluate(
    parallel.eval_step(experiment.trainer.eval_step),
    parallel,
    parallel.replicate(state),
    experiment.eval_batches(),
  )
  step = int(state.step)
  if cli.JSON.value:
    print(json.dumps({'step': step, **evaluation.flat_names(results)}))
  else:
    print(f'checkpoint of step {step}')
    print(evaluation.report(results))


def _restore_latest(workdir: pathlib.Path, experiment):
  from nfnet_jax.training import checkpoint

  directory = workdir / 'checkpoints'
  state = None
  if directory.is_dir():
    with (
      errors.as_input_error(checkpoint.UnreadableError),
      checkpoint.Checkpoints(directory) as checkpoints,
    ):
      state = checkpoints.restore_latest(like=experiment.abstract_state())
  if state is None:
    raise errors.InputError(f"'{workdir}' holds no checkpoint yet.")
  return state


if __name__ == '__main__':
  cli.run(main)
