"""Train with and without clipping over learning rates from 0.001 to 6.4.

python -m experiments.learning_rate.run
"""

from __future__ import annotations

import pathlib

import pandas as pd

from experiments.studies import figures, study, summaries, sweep, training

RATES = (0.001, 0.005, 0.02, 0.1, 0.4, 1.6, 3.2, 6.4)
FIRST_RUN = 0.1  # The learning rate of the README's first run.
SEEDS = (0, 1, 2)
NONE, AGC, GLOBAL = 'none', 'AGC', 'global norm'
# Method -> its settings. The threshold of the global norm is the best of
# `THRESHOLDS` at the learning rate of the first run.
METHODS = {
  NONE: {'optimizer.clipping': 0.0},
  AGC: {'optimizer.clipping': 0.01},
  GLOBAL: {'optimizer.clipping': 1.0, 'optimizer.clip_by': 'global_norm'},
}
THRESHOLDS = (0.1, 0.3, 1.0, 3.0, 10.0)
_KEEP = 5  # Steps per row of the kept metrics.
# Held-out accuracy that counts as trained.
TRAINED = 0.95


def runs(quick: bool) -> list[training.Run]:
  """Return the runs over rates, and those over thresholds at one rate."""
  rates = (0.1, 1.6) if quick else RATES
  seeds = SEEDS[:1] if quick else SEEDS
  thresholds = (1.0, 3.0) if quick else THRESHOLDS
  points = {
    (method, rate, METHODS[method]['optimizer.clipping'])
    for method in METHODS
    for rate in rates
  } | {(GLOBAL, FIRST_RUN, threshold) for threshold in thresholds}
  return [
    _run(method, rate, threshold, seed, quick)
    for method, rate, threshold in sorted(points)
    for seed in seeds
  ]


def _run(
  method: str, rate: float, threshold: float, seed: int, quick: bool
) -> training.Run:
  return training.Run(
    labels={
      'method': method,
      'threshold': threshold,
      'learning_rate': rate,
      'seed': seed,
    },
    config='digits',
    settings={
      **METHODS[method],
      'optimizer.clipping': threshold,
      'optimizer.learning_rate': rate,
      'seed': seed,
      'dataset': 'digits',
      **({'train_for': '60 steps'} if quick else {}),
    },
    keep_steps=_KEEP * (rate == FIRST_RUN and _is_swept(method, threshold)),
  )


def _is_swept(method: str, threshold: float) -> bool:
  return threshold == METHODS[method]['optimizer.clipping']


def report(
  rows: pd.DataFrame, steps: pd.DataFrame, folder: pathlib.Path
) -> str:
  """Draw the figure, and return what it shows."""
  at_first = rows[rows.learning_rate == FIRST_RUN]
  swept = rows[
    rows.threshold
    == rows.method.map(lambda name: METHODS[name]['optimizer.clipping'])
  ]
  draw(swept, steps, folder)
  means = at_first[at_first.method == GLOBAL].groupby('threshold').top1.mean()
  # Equal means are equally good.
  best = means.index[means >= means.max() - 1e-9]
  return ' '.join(
    [
      *(_range(swept[swept.method == method], method) for method in METHODS),
      f'At rate {FIRST_RUN:g} the best thresholds of the global norm are '
      f'{", ".join(f"{value:g}" for value in best)}; the sweep uses '
      f'{METHODS[GLOBAL]["optimizer.clipping"]:g}.',
    ]
  )


def _range(rows: pd.DataFrame, method: str) -> str:
  """Return the learning rates at which all seeds of a method train."""
  first = summaries.percent(rows[rows.learning_rate == FIRST_RUN].top1)
  trained = summaries.trained_at(rows, 'learning_rate', TRAINED)
  return (
    f'{method}: {first} at rate {FIRST_RUN:g}; all seeds reach {TRAINED:.0%} '
    f'at the rates {trained}.'
  )


def draw(rows: pd.DataFrame, steps: pd.DataFrame, folder: pathlib.Path) -> None:
  """Draw accuracy by learning rate, and three curves of the first run."""
  rows = rows.assign(percent=100 * rows.top1)
  figure, axes = figures.subplots(columns=2, rows=2)
  by_rate, *curves = axes.flat
  for method in METHODS:
    mine = rows[rows.method == method]
    figures.band(by_rate, mine, 'learning_rate', 'percent', method)
  by_rate.set(xscale='log', xlabel='peak learning rate')
  by_rate.set_ylabel('held-out top-1 (%)')
  by_rate.axvline(FIRST_RUN, color='grey', linestyle='--', linewidth=1)
  figures.chance(by_rate)
  for axis, name in zip(curves, ('loss', 'grad_norm', 'clipped')):
    for method in METHODS:
      mine = steps[steps.method == method]
      if mine.empty or name not in mine or mine[name].isna().all():
        continue
      values = mine.groupby('seed')[name].transform(figures.smooth, 4)
      smoothed = mine.assign(value=values)
      figures.band(axis, smoothed, 'step', 'value', method, markers=False)
    axis.set_xlabel('step')
  curves[0].set_yscale('log')
  curves[1].set_yscale('log')
  figures.titles(
    axes.flat,
    (
      'accuracy after 30 epochs',
      f'training loss at rate {FIRST_RUN:g}',
      f'gradient norm at rate {FIRST_RUN:g}',
      f'share of clipped units at rate {FIRST_RUN:g}',
    ),
  )
  figures.legend_below(figure, by_rate)
  figures.save(figure, folder, 'results.png')


def answer(options: study.Options) -> str:
  """Train, draw, and return the verdict."""
  rows, steps = sweep.sweep(
    runs(options.quick), options.folder, options.workers
  )
  return report(rows, steps, options.folder)


if __name__ == '__main__':
  study.main(
    'At which learning rates does an NFNet train, by clipping?',
    pathlib.Path(__file__).parent,
    answer,
  )
