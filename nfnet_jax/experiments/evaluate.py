"""Evaluate the latest checkpoint of a run, or any trained network.

  python -m nfnet_jax.experiments.evaluate --workdir=/tmp/digits

evaluates the raw and the EMA weights of a run with its own settings; those
under `run` may be overridden, for example `--config.run.data_dir=DIR`.

  python -m nfnet_jax.experiments.evaluate --weights=F0 --config=f0

evaluates any weights on the data of any config. Images are preprocessed as for
the weights, unless `--config.data.eval_...` overrides it. `--json` prints one
object: `step` (of a run), `examples`, and `loss`, `top1`, `top5` of the weights
and, with the prefix `ema_`, of the EMA weights of a run.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from absl import flags
from etils import epath

from nfnet_jax import errors
from nfnet_jax.cli import command, common_flags, config_flag, session
from nfnet_jax.storage import failures, run_files

if TYPE_CHECKING:
  from nfnet_jax.config import experiment as experiment_lib
  from nfnet_jax.training import evaluation
  from nfnet_jax.training import state as state_lib

for _name in (
  *config_flag.FLAGS,
  'workdir',
  'weights',
  'json',
  *session.FLAGS,
):
  flags.declare_key_flag(_name)


def main() -> None:
  """Evaluate `--weights`, or the run in `--workdir`."""
  from nfnet_jax.distributed import collectives, processes
  from nfnet_jax.training import evaluation

  with session.distributed_session() as log:
    given = 'given' if common_flags.WEIGHTS.value else 'not given'
    collectives.assert_equal({'--weights': given})
    if common_flags.WEIGHTS.value:
      step, results = None, _evaluate_weights(log)
    else:
      step, results = _evaluate_run(common_flags.get_workdir())
    if not processes.is_primary():
      return
    about = {} if step is None else {'step': step}
    if common_flags.JSON.value:
      print(evaluation.to_json(results, **about))
      return
    for name, value in about.items():
      print(f'checkpoint of {name} {value}')
    print(evaluation.report(results))


def _evaluate_run(workdir: epath.Path) -> tuple[int, dict[str, float]]:
  """Evaluate the latest checkpoint of a run; return its step and results."""
  from nfnet_jax.config import workdir as workdir_lib
  from nfnet_jax.distributed import collectives, processes
  from nfnet_jax.training import evaluation

  with collectives.failing_together():
    if processes.is_primary():
      workdir_lib.load(workdir)  # Or raise an error.
  experiment = session.open_experiment(workdir=workdir, trains=False)
  state = None
  with collectives.failing_together():
    if processes.is_primary():
      state = restore_latest(workdir, experiment)
  state = collectives.broadcast(state, experiment.abstract_state())
  return int(state.step), _evaluate(experiment, evaluation.weights_of(state))


def _evaluate_weights(log: command.LogFn) -> dict[str, float]:
  """Evaluate `--weights` on the dataset of `--config`."""
  from nfnet_jax.distributed import collectives
  from nfnet_jax.training import evaluation

  with collectives.primary_first():  # It downloads them, for all on its host.
    weights = common_flags.get_weights()
  config, overrides = config_flag.get_config(), config_flag.get_overrides()
  config.weights = None
  for name, value in dataclasses.asdict(weights.preprocessing).items():
    if f'data.eval_{name}' not in overrides:
      config.data[f'eval_{name}'] = value
  experiment = session.open_experiment(weights=weights, trains=False)
  num_classes = experiment.source.num_classes
  if weights.num_classes != num_classes:
    raise errors.InputError(
      f"'{common_flags.WEIGHTS.value}' has {weights.num_classes} classes, "
      f"'{config.dataset}' has {num_classes}. Fine-tune the weights with "
      '--config=finetune.'
    )
  used = experiment.preprocessing
  origin = 'of the weights' if used == weights.preprocessing else 'overridden'
  log(
    f'images     {used.size} px, {used.crop} crop, margin {used.margin} px: '
    f'{origin}'
  )
  return _evaluate(
    experiment, {evaluation.RAW: (weights.params, weights.model_state)}
  )


def _evaluate(
  experiment: experiment_lib.Experiment, weights: evaluation.Weights
) -> dict[str, float]:
  from nfnet_jax.distributed import compilation_cache, preemption, processes
  from nfnet_jax.training import data_parallel, evaluation

  cache_folder = compilation_cache.enable_compilation_cache()
  if cache_folder and processes.is_primary():
    command.log(f'programs   {cache_folder}')
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
      # With several processes, nothing else would react to SIGTERM.
      poll=end_if_asked,
    )


def restore_latest(
  workdir: epath.Path, experiment: experiment_lib.Experiment
) -> state_lib.TrainState:
  """Read the state of the latest checkpoint of a run.

  Raises:
    errors.InputError: if there is none, or it can never be read.
    errors.RunError: if it cannot be read now.
  """
  from nfnet_jax.storage import buckets
  from nfnet_jax.training import checkpoint

  directory = workdir / run_files.CHECKPOINTS
  state = None
  with failures.as_command_error():
    buckets.check(directory, to_write=False)
    is_there = failures.read(f'Reading {directory}', directory.is_dir)
  if is_there:
    with (
      failures.as_command_error(),
      errors.as_input_error(checkpoint.UnreadableError),
      checkpoint.Checkpoints(directory, read_only=True) as checkpoints,
    ):
      state = checkpoints.restore_latest(experiment.abstract_state())
  if state is None:
    raise errors.InputError(
      f"'{workdir}' holds no checkpoint yet. Wait until the run saves one."
    )
  return state


if __name__ == '__main__':
  command.run(main, on_a_run=True)
