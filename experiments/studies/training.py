"""Train runs that differ in a few numbers, on the same batches.

The step is the production step. Learning rate, clipping threshold and the like
are its arguments here, so that one compiled program serves all runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import re
import time
from typing import Any

import jax
import ml_collections
import numpy as np
import pandas as pd

from experiments.studies import datasets, networks
from nfnet_jax import trees
from nfnet_jax.config import base, lookup, steps
from nfnet_jax.config import experiment as experiment_lib
from nfnet_jax.optim import groups
from nfnet_jax.training import data_parallel, evaluation, layouts
from nfnet_jax.training import state as state_lib
from nfnet_jax.weights import network, save

# Settings that are arguments of the compiled step, unless they are 0 or None:
# then the program is another one.
ARGUMENTS = (
  'seed',
  'optimizer.learning_rate',
  'optimizer.clipping',
  'optimizer.trust_coefficient',
)
# These are arguments even if they are 0.
ALWAYS_ARGUMENTS = 'seed', 'optimizer.learning_rate'
# Steps between two readings of the metrics.
_READ_EVERY = 25
# Steps at the end over which the training loss is averaged.
_LAST = 20

Row = dict[str, Any]

# Program -> its training step and its evaluation, compiled once per process.
_PROGRAMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run of a study.

  Attributes:
    labels: what the run is called in the study's table; no other run of the
      study has the same labels.
    config: name of its configuration.
    settings: dotted names of settings -> values that differ from it.
    keep_steps: number of steps that a kept row of metrics is the mean of; 0 to
      keep none.
    eps: minimum of the weight norm in AGC.
    clipped: regular expression of the parameters that are clipped, the
      classifier's kernel included; by default those of the recipe.
    save: whether other runs may start from its weights, whose setting `weights`
      is then the key of this run.
  """

  labels: Mapping[str, Any]
  config: str
  settings: Mapping[str, Any]
  keep_steps: int = 0
  eps: float = 1e-3
  clipped: str = ''
  save: bool = False

  @property
  def options(self) -> Row:
    """Options of the optimiser that are no settings."""
    options: Row = {}
    if self.eps != 1e-3:
      options['eps'] = self.eps
    if self.clipped:
      options['clipped'] = self.clipped
    return options

  @property
  def program(self) -> str:
    """Name of the compiled step; runs with the same name share it."""
    settings = dict(self.settings)
    for name in ARGUMENTS:
      if name in ALWAYS_ARGUMENTS or settings.get(name):
        settings[name] = 'argument'
    return self._text(settings)

  @property
  def key(self) -> str:
    """Short name of all that defines the run."""
    text = self._text(dict(self.settings))
    return hashlib.sha256(text.encode()).hexdigest()[:8]

  @property
  def batches(self) -> str:
    """Name of its stream of batches and of its program."""
    return f'{self.program} seed {self.settings.get("seed", 0)}'

  def _text(self, settings: Row) -> str:
    parts = [self.config, settings, *([self.options] if self.options else [])]
    return json.dumps(parts, sort_keys=True)


@dataclasses.dataclass
class _Progress:
  """A run in progress.

  Attributes:
    state: its training state.
    arguments: values of the step's arguments.
    steps: metrics of the steps so far.
    diverged: whether a step was not finite.
  """

  state: state_lib.TrainState
  arguments: dict[str, float]
  steps: list[Row] = dataclasses.field(default_factory=list)
  diverged: bool = False


def train_together(
  runs: Sequence[Run], report: Callable[[float], None] = lambda share: None
) -> list[tuple[Row, list[Row]]]:
  """Train runs that share their program and their batches.

  Each run is the one that the training command would make of its configuration.
  A run ends when a step is not finite; its last good weights are evaluated.

  Args:
    runs: runs of the same `Run.batches`.
    report: called now and then with the number of runs (usually a fraction)
      that were trained since the last call.

  Returns:
    For each run its row (labels, then results), and its kept metrics.
  """
  start = time.process_time()
  experiments = [_open(run) for run in runs]
  experiment = experiments[0]
  step, evaluate = _compile(runs[0], experiment)
  running = [
    _Progress(experiment.create_state(), _arguments(each.config))
    for each in experiments
  ]
  total, pending, reported = experiment.cadence.total, [], 0
  batches = experiment.train_batches(0, lambda text: None)
  for count, batch in zip(range(1, total + 1), batches):
    batch = jax.device_put(batch)
    for run in running:
      if not run.diverged:
        run.state, metrics = step(run.state, batch, run.arguments)
        pending.append((run, count, metrics))
    if count % _READ_EVERY == 0 or count == total:
      _read(pending)
      pending = []
      report((count - reported) / total * len(runs))
      reported = count
  results = [evaluate(experiment, run.state) for run in running]
  for run, progress in zip(runs, running):
    if run.save:
      _save(run, progress.state, experiment)
  seconds = (time.process_time() - start) / len(runs)
  return [
    (_row(run, progress, result, seconds), _kept(run, progress))
    for run, progress, result in zip(runs, running, results)
  ]


def _open(run: Run) -> experiment_lib.Experiment:
  networks.register()
  settings = {
    **run.settings,
    'dataset': datasets.dataset(run.settings['dataset']),
    'run.data_dir': datasets.data_dir(),
  }
  if run.settings.get('weights'):
    settings['weights'] = str(datasets.weights(run.settings['weights']))
  return steps.open_experiment(lookup.load(run.config, settings), devices=1)


def _arguments(config: ml_collections.ConfigDict) -> dict[str, float]:
  setting = base.flat(config)
  return {
    name: setting[name]
    for name in ARGUMENTS
    if setting[name] or name in ALWAYS_ARGUMENTS
  }


def _compile(
  run: Run, experiment: experiment_lib.Experiment
) -> tuple[Callable[..., Any], Callable[..., dict[str, float]]]:
  """Return the training step and the evaluation of a run's program."""
  if run.program in _PROGRAMS:
    return _PROGRAMS[run.program]
  layout = layouts.Layout(axis=None)
  options = dict(run.options)
  if 'clipped' in options:
    options['groups'] = clip_only(options.pop('clipped'))

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, batch, arguments):
    trainer = experiment.trainer_with(arguments, **options)
    trainer = dataclasses.replace(trainer, layout=layout)
    return trainer.train_step(state, batch)

  parallel = data_parallel.DataParallel(jax.local_devices()[:1])
  eval_step = parallel.eval_step(evaluation.evaluator(experiment.plain_model))

  def evaluate(experiment, state):
    return evaluation.evaluate(
      eval_step,
      parallel,
      evaluation.weights_of(state),
      experiment.eval_batches(lambda text: None),
    )

  _PROGRAMS[run.program] = step, evaluate
  return step, evaluate


def clip_only(pattern: str) -> list[groups.Group]:
  """Return the recipe's groups, where only matching parameters are clipped."""
  matches = re.compile(pattern).search

  def part(group: groups.Group, clip: bool) -> groups.Group:
    contains = lambda path: (
      group.contains(path) and (matches(path) is not None) == clip
    )
    name = group.name if clip else f'{group.name}, not clipped'
    return dataclasses.replace(group, name=name, contains=contains, clip=clip)

  return [
    part(group, clip) for group in groups.NFNET_GROUPS for clip in (True, False)
  ]


def _read(pending: Sequence[tuple[_Progress, int, Mapping[str, Any]]]) -> None:
  """Fetch metrics of steps, and find the runs that diverged."""
  metrics = jax.device_get([metrics for _, _, metrics in pending])
  for (run, step, _), row in zip(pending, metrics):
    values = {name: float(value) for name, value in row.items()}
    if not values.pop('applied'):
      run.diverged = True
    if not run.diverged:
      run.steps.append({'step': step, **values})


def _kept(run: Run, progress: _Progress) -> list[Row]:
  """Return means of the metrics over intervals, named by their last step."""
  if not run.keep_steps or not progress.steps:
    return []
  steps = pd.DataFrame(progress.steps)
  means = steps.groupby((steps.step - 1) // run.keep_steps).mean()
  means['step'] = steps.groupby((steps.step - 1) // run.keep_steps).step.max()
  return means.round(5).to_dict('records')


def _save(
  run: Run, state: state_lib.TrainState, experiment: experiment_lib.Experiment
) -> None:
  params, model_state = evaluation.weights_of(state)[evaluation.RAW]
  weights = network.Weights(
    params=jax.device_get(params),
    model_state=jax.device_get(model_state),
    model=experiment.config.model.name,
    num_classes=experiment.source.num_classes,
    options={},
    class_names=experiment.source.class_names,
    preprocessing=experiment.preprocessing,
  )
  path = datasets.weights(run.key)
  path.parent.mkdir(parents=True, exist_ok=True)
  save.save_weights(path, weights)


def _row(
  run: Run, progress: _Progress, result: Mapping[str, float], seconds: float
) -> Row:
  last = [row['loss'] for row in progress.steps[-_LAST:]]
  clipped = [row['clipped'] for row in progress.steps if 'clipped' in row]
  return {
    **run.labels,
    'top1': round(result['eval/top1'], 4),
    'ema_top1': round(result['eval_ema/top1'], 4),
    'train_loss': round(float(np.mean(last)), 4) if last else '',
    'clipped': round(float(np.mean(clipped)), 4) if clipped else '',
    'skip_gain': _mean_skip_gain(progress.state.params),
    'diverged': int(progress.diverged),
    'steps': len(progress.steps),
    'core_seconds': round(seconds, 1),
  }


def _mean_skip_gain(params: Any) -> float | str:
  """Return the mean size of the branches' gains, if there are any."""
  gains = [
    abs(float(value))
    for path, value in trees.named_leaves(params)
    if path.endswith('/skip_gain')
  ]
  return round(float(np.mean(gains)), 5) if gains else ''
