"""Train NFNet-nano without one of its parts, or one of its recipe's.

python -m experiments.parts.run
"""

from __future__ import annotations

import pathlib
from typing import Any

import pandas as pd

from experiments.studies import figures, study, summaries, sweep, training

SEEDS = (0, 1, 2)
# At the README's rate of 0.1 the skip gains stay near 0, and no branch matters.
RATE, EPOCHS = 1.6, 30
WHOLE = 'nothing'
# What is left out -> settings. Fused blocks contain all parts, so none is used.
PARTS: dict[str, dict[str, Any]] = {
  WHOLE: {},
  'AGC': {'optimizer.clipping': 0.0},
  'gamma': {'model.gamma': False},
  'skip gains': {'model.branch_gain': False},
  'stochastic depth': {'model.stochdepth_rate': 0.0},
  'label smoothing': {'label_smoothing': 0.0},
  'second 3x3 convolution': {'model.name': 'nfnet_parts_nano_single'},
  'squeeze-excite': {'model.squeeze_excite': False},
}
# Evaluated from the same runs.
EMA = 'the moving average'


def runs(quick: bool) -> list[training.Run]:
  """Return the runs over parts and seeds."""
  return [
    training.Run(
      labels={'without': part, 'seed': seed},
      config='digits',
      settings={
        'model.name': 'nfnet_parts_nano',
        'run.fast_paths': 'fast_convs',
        'dataset': 'digits',
        'seed': seed,
        'train_for': '20 steps' if quick else f'{EPOCHS} epochs',
        'optimizer.clipping': 0.01,
        'optimizer.learning_rate': RATE,
        **({'optimizer.warmup': '2 steps'} if quick else {}),
        **settings,
      },
    )
    for part, settings in PARTS.items()
    for seed in (SEEDS[:1] if quick else SEEDS)
    if not quick or part in (WHOLE, 'squeeze-excite')
  ]


def answer(options: study.Options) -> str:
  """Train, draw, and return the verdict."""
  rows, _ = sweep.sweep(runs(options.quick), options.folder, options.workers)
  rows = accuracies(rows)
  draw(rows, options.folder)
  return verdict(rows)


def accuracies(rows: pd.DataFrame) -> pd.DataFrame:
  """Return rows of `without`, `seed` and `top1` in percent.

  The accuracy is that of the moving average, as the recipe evaluates; without
  it, that of the weights themselves.
  """
  whole = rows[rows.without == WHOLE]
  return pd.concat(
    [
      rows.assign(top1=rows.ema_top1),
      whole.assign(without=EMA),
    ]
  )[['without', 'seed', 'top1']].assign(percent=lambda r: 100 * r.top1)


def draw(rows: pd.DataFrame, folder: pathlib.Path) -> None:
  """Draw the accuracy of every seed, in full and near the top."""
  figure, axes = figures.subplots(columns=2, sharey=True)
  for axis in axes.flat:
    figures.seeds(axis, rows, 'without', 'percent')
    axis.set_xlabel('held-out top-1 (%)')
  axes[0, 0].set(ylabel='left out', xlim=(0, 100))
  axes[0, 1].set(xlim=(95, 100))
  figures.titles(axes.flat, ('all', 'near the top'))
  figures.save(figure, folder, 'results.png')


def verdict(rows: pd.DataFrame) -> str:
  """Return the accuracies, in one sentence."""
  parts = [
    f'{part} {summaries.percent(mine.top1)}'
    for part, mine in rows.groupby('without', sort=False)
  ]
  return f'Held-out top-1 without {"; ".join(parts)}.'


if __name__ == '__main__':
  study.main(
    'What does each part of an NFNet and of its recipe add?',
    pathlib.Path(__file__).parent,
    answer,
  )
