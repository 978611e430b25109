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

from nfnet_jax import errors
from nfnet_jax.cli import command, common_flags, session
from nfnet_jax.config import lookup
from nfnet_jax.storage import failures

for _name in (
  'config',
  'list_configs',
  'workdir',
  'weights',
  'json',
  *session.FLAGS,
):
  flags.declare_key_flag(_name)


def main() -> None:
  from nfnet_jax.distributed import collectives, processes
  from nfnet_jax.training import evaluation

  with session.distributed_session():
    with errors.as_input_error():
      given = 'given' if common_flags.WEIGHTS.value else 'not given'
      collectives.assert_equal({'--weights': given})
    if common_flags.WEIGHTS.value:
      about, results = {}, _evaluate_weights()
    else:
      step, results = _evaluate_run(common_flags.get_workdir())
      about = {'step': step}
    if not processes.is_primary():
      return
    if common_flags.JSON.value:
      print(evaluation.to_json(results, **about))
      return
    for name, value in about.items():
      print(f'checkpoint of {name} {value}')
    print(evaluation.report(results))


def _evaluate_run(workdir: epath.Path) -> tuple[int, dict[str, float]]:
  from nfnet_jax.config import base as config_lib
  from nfnet_jax.config import experiment as experiment_lib
  from nfnet_jax.config import validate
  from nfnet_jax.distributed import collectives, processes
  from nfnet_jax.training import evaluation

  config = config_lib.base()
  config.update(collectives.from_primary(lambda: _config_of(workdir).to_dict()))
  config = validate.resolve_and_check(config, begun=True)
  validate.check_same_everywhere(config)
  experiment, state = experiment_lib.Experiment.open(config), None
  if processes.is_primary():
    state = restore_latest(workdir, experiment)
  state = collectives.broadcast(state, like=experiment.abstract_state())
  weights = evaluation.weights_of(state)
  return int(state.step), _evaluate(experiment, weights)


def _config_of(workdir: epath.Path):
  """Returns the configuration to evaluate with, once it is that of the run."""
  from nfnet_jax.config import validate
  from nfnet_jax.config import workdir as workdir_lib

  workdir_lib.load(workdir)  # Or complains.
  config = validate.resolve_and_check(lookup.get_config(), begun=True)
  workdir_lib.check_same(config, workdir)
  return config


def _evaluate_weights() -> dict[str, float]:
  from nfnet_jax.config import experiment as experiment_lib
  from nfnet_jax.config import validate
  from nfnet_jax.training import evaluation

  weights = common_flags.get_weights()
  config = lookup.get_config()
  with config.unlocked():
    config.weights = None
  config = validate.resolve_and_check(
    validate.set_model_from_weights(config, weights)
  )
  validate.check_same_everywhere(config)
  experiment = experiment_lib.Experiment.open(config, to_train=False)
  if weights.num_classes != experiment.source.num_classes:
    raise errors.InputError(
      f"'{common_flags.WEIGHTS.value}' tells {weights.num_classes} classes apart, "
      f"'{config.dataset}' has {experiment.source.num_classes}; fine-tune it "
      'with --config=finetune.'
    )
  return _evaluate(
    experiment, {evaluation.RAW: (weights.params, weights.model_state)}
  )


def _evaluate(experiment, weights) -> dict[str, float]:
  from nfnet_jax.distributed import compilation_cache, preemption, processes
  from nfnet_jax.training import data_parallel, evaluation

  with errors.as_input_error():
    kept = compilation_cache.enable_compilation_cache()
  if kept and processes.is_primary():
    command.log(f'programs   {kept}')
  parallel = data_parallel.DataParallel()
  with preemption.StopRequest() as stop:

    def end_if_asked() -> None:
      if stop.poll():
        raise errors.RunError('Interrupted.')

    return evaluation.evaluate(
      parallel.eval_step(evaluation.evaluator(experiment.model)),
      parallel,
      parallel.replicate(weights),
      experiment.eval_batches(command.log),
      # Of several processes none would heed SIGTERM otherwise.
      poll=end_if_asked,
    )


def restore_latest(workdir: epath.Path, experiment):
  """Reads the state of a run's latest checkpoint.

  Raises:
    errors.InputError: if there is none, or it can never be read.
    errors.RunError: if it cannot be read now.
  """
  from nfnet_jax.storage import buckets
  from nfnet_jax.training import checkpoint

  directory = workdir / 'checkpoints'
  state = None
  with (
    failures.as_command_error(),
    failures.as_os_error(f'Reading {directory}'),
  ):
    buckets.check(directory, to_write=False)
    is_there = directory.is_dir()
  if is_there:
    with (
      failures.as_command_error(),
      errors.as_input_error(checkpoint.UnreadableError),
      checkpoint.Checkpoints(directory, read_only=True) as checkpoints,
    ):
      state = checkpoints.restore_latest(experiment.abstract_state())
  if state is None:
    raise errors.InputError(f"'{workdir}' holds no checkpoint yet.")
  return state


if __name__ == '__main__':
  command.run(main, on_a_run=True)
