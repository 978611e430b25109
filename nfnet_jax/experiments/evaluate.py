"""Evaluates a run's latest checkpoint, or any trained network.

  python -m nfnet_jax.experiments.evaluate --workdir=/tmp/digits

evaluates the raw and the averaged weights of a run. Its own settings hold;
those under `run` may be overridden, as in `--config.run.data_dir=DIR`. And

  python -m nfnet_jax.experiments.evaluate --weights=F0_haiku.npz --config=f0

evaluates any weights on the data of any config. `--json` prints one object:
`step` (of a run), `examples`, and `loss`, `top1`, `top5` of the weights and,
with the prefix `ema_`, of a run's averaged ones.
"""

from absl import flags
from etils import epath

from nfnet_jax.experiments import cli, errors, naming, several, shared

for _name in (
  'config',
  'list_configs',
  'workdir',
  'weights',
  'json',
  *several.FLAGS,
):
  flags.declare_key_flag(_name)


def main() -> None:
  from nfnet_jax.training import evaluation, exchange, processes

  with several.together():
    with errors.as_input_error():
      given = 'given' if shared.WEIGHTS.value else 'not given'
      exchange.agree({'--weights': given})
    if shared.WEIGHTS.value:
      about, results = {}, _evaluate_weights()
    else:
      step, results = _evaluate_run(shared.get_workdir())
      about = {'step': step}
    if not processes.is_primary():
      return
    if shared.JSON.value:
      print(evaluation.to_json(results, **about))
      return
    for name, value in about.items():
      print(f'checkpoint of {name} {value}')
    print(evaluation.report(results))


def _evaluate_run(workdir: epath.Path) -> tuple[int, dict[str, float]]:
  from nfnet_jax.experiments import assemble, checks
  from nfnet_jax.experiments import config as config_lib
  from nfnet_jax.training import evaluation, exchange, processes

  config = config_lib.base()
  config.update(exchange.from_primary(lambda: _config_of(workdir).to_dict()))
  config = checks.resolve_and_check(config, begun=True)
  checks.check_same_everywhere(config)
  experiment, state = assemble.Experiment.open(config), None
  if processes.is_primary():
    state = restore_latest(workdir, experiment)
  state = exchange.broadcast(state, like=experiment.abstract_state())
  weights = evaluation.weights_of(state)
  return int(state.step), _evaluate(experiment, weights)


def _config_of(workdir: epath.Path):
  """Returns the configuration to evaluate with, once it is that of the run."""
  from nfnet_jax.experiments import checks, workdirs

  workdirs.load(workdir)  # Or complains.
  config = checks.resolve_and_check(naming.get_config(), begun=True)
  workdirs.check_same(config, workdir)
  return config


def _evaluate_weights() -> dict[str, float]:
  from nfnet_jax.experiments import assemble, checks
  from nfnet_jax.training import evaluation

  weights = shared.get_weights()
  config = naming.get_config()
  with config.unlocked():
    config.weights = None
  config = checks.resolve_and_check(checks.adopt(config, weights))
  checks.check_same_everywhere(config)
  experiment = assemble.Experiment.open(config, to_train=False)
  if weights.num_classes != experiment.source.num_classes:
    raise errors.InputError(
      f"'{shared.WEIGHTS.value}' tells {weights.num_classes} classes apart, "
      f"'{config.dataset}' has {experiment.source.num_classes}; fine-tune it "
      'with --config=finetune.'
    )
  return _evaluate(
    experiment, {evaluation.RAW: (weights.params, weights.model_state)}
  )


def _evaluate(experiment, weights) -> dict[str, float]:
  from nfnet_jax.training import (
    evaluation,
    interrupt,
    processes,
    programs,
  )
  from nfnet_jax.training import parallel as parallel_lib

  with errors.as_input_error():
    kept = programs.keep()
  if kept and processes.is_primary():
    cli.say(f'programs   {kept}')
  parallel = parallel_lib.DataParallel()
  with interrupt.StopRequest() as stop:

    def end_if_asked() -> None:
      if stop.poll():
        raise errors.RunError('Interrupted.')

    return evaluation.evaluate(
      parallel.eval_step(evaluation.evaluator(experiment.model)),
      parallel,
      parallel.replicate(weights),
      experiment.eval_batches(cli.say),
      # Of several processes none would heed SIGTERM otherwise.
      poll=end_if_asked,
    )


def restore_latest(workdir: epath.Path, experiment):
  """Reads the state of a run's latest checkpoint.

  Raises:
    errors.InputError: if there is none, or it can never be read.
    errors.RunError: if it cannot be read now.
  """
  from nfnet_jax.training import buckets, checkpoint, files

  directory = workdir / 'checkpoints'
  state = None
  with (
    errors.of_storage(),
    files.as_os_error(f'Reading {directory}'),
  ):
    buckets.check(directory, to_write=False)
    is_there = directory.is_dir()
  if is_there:
    with (
      errors.of_storage(),
      errors.as_input_error(checkpoint.UnreadableError),
      checkpoint.Checkpoints(directory, read_only=True) as checkpoints,
    ):
      state = checkpoints.restore_latest(like=experiment.abstract_state())
  if state is None:
    raise errors.InputError(f"'{workdir}' holds no checkpoint yet.")
  return state


if __name__ == '__main__':
  cli.run(main, on_a_run=True)
