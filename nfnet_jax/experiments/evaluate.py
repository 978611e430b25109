"""Evaluates a run's latest checkpoint: raw and averaged weights.

  python -m nfnet_jax.experiments.evaluate --workdir=/tmp/digits

The run's own settings hold; those under `run` may be overridden, as in
`--config.run.data_dir=DIR`. `--json` prints one object: `step`, `examples`, and
`loss`, `top1`, `top5` of the raw weights and, with the prefix `ema_`, of the
averaged ones.
"""

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
  config = assemble.resolve_and_check(cli.get_config())
  config_lib.check_same(config, workdir)
  experiment = assemble.Experiment.open(config)
  state = restore_latest(workdir, experiment)
  parallel = parallel_lib.DataParallel()
  results = evaluation.evaluate(
    parallel.eval_step(experiment.trainer.eval_step),
    parallel,
    parallel.replicate(state),
    experiment.eval_batches(cli.say),
  )
  step = int(state.step)
  if cli.JSON.value:
    print(evaluation.to_json(step, results))
  else:
    print(f'checkpoint of step {step}')
    print(evaluation.report(results))


def restore_latest(workdir: pathlib.Path, experiment):
  """Reads the state of a run's latest checkpoint.

  Raises:
    errors.InputError: if there is none.
  """
  from nfnet_jax.training import checkpoint

  directory = workdir / 'checkpoints'
  state = None
  if directory.is_dir():
    with (
      errors.as_input_error(checkpoint.UnreadableError),
      checkpoint.Checkpoints(directory, read_only=True) as checkpoints,
    ):
      state = checkpoints.restore_latest(like=experiment.abstract_state())
  if state is None:
    raise errors.InputError(f"'{workdir}' holds no checkpoint yet.")
  return state


if __name__ == '__main__':
  cli.run(main, on_a_run=True)
