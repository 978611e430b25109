"""Train with batch normalisation and without it at small batches.

python -m experiments.small_batches.run
"""

from __future__ import annotations

import pathlib

import pandas as pd

from experiments.studies import figures, study, summaries, sweep, training

BATCHES = (2, 4, 8, 16)
SEEDS = (0, 1, 2)
# The learning rate is proportional to the batch.
RATE, RATE_BATCH = 0.05, 64
EPOCHS, SIZE = 30, 16
MODELS = {'BN': 'bn_resnet_pico', 'NF': 'nf_resnet_pico'}


def runs(quick: bool) -> list[training.Run]:
  """Return the runs over networks, batches and seeds."""
  return [
    training.Run(
      labels={'method': method, 'batch': batch, 'seed': seed},
      config='digits',
      settings={
        'model.name': model,
        'data.image_size': SIZE,
        'data.eval_size': SIZE,
        'batch_size': batch,
        'data.shards': min(BATCHES),
        'run.eval_batch_size': 64,
        'dataset': 'digits',
        'seed': seed,
        'train_for': '20 steps' if quick else f'{EPOCHS} epochs',
        'optimizer.clipping': 0.0,
        'optimizer.learning_rate': RATE * batch / RATE_BATCH,
        **({'optimizer.warmup': '2 steps'} if quick else {}),
      },
    )
    for method, model in MODELS.items()
    for batch in (BATCHES[:1] if quick else BATCHES)
    for seed in (SEEDS[:1] if quick else SEEDS)
  ]


def answer(options: study.Options) -> str:
  """Train, draw, and return the verdict."""
  rows, _ = sweep.sweep(runs(options.quick), options.folder, options.workers)
  draw(rows, options.folder)
  return verdict(rows)


def draw(rows: pd.DataFrame, folder: pathlib.Path) -> None:
  """Draw accuracy and training loss by batch size."""
  rows = rows.assign(percent=100 * rows.top1)
  figure, axes = figures.subplots(columns=2)
  for axis, value in zip(axes.flat, ('percent', 'train_loss')):
    for method, mine in rows.groupby('method', sort=False):
      figures.band(axis, mine, 'batch', value, method)
    axis.set_xscale('log', base=2)
    axis.set_xticks(sorted(set(rows.batch)), sorted(set(rows.batch)))
    axis.set_xlabel('batch size')
  axes[0, 0].legend()
  figures.titles(axes.flat, ('held-out top-1 (%)', 'training loss'))
  figures.save(figure, folder, 'results.png')


def verdict(rows: pd.DataFrame) -> str:
  """Return the accuracies by batch, in sentences."""
  parts = [
    f'{method} at batch {batch} {summaries.percent(mine.top1)}'
    for (batch, method), mine in rows.groupby(['batch', 'method'], sort=False)
  ]
  return f'Held-out top-1, mean and range of seeds: {"; ".join(parts)}.'


if __name__ == '__main__':
  study.main(
    'How do networks with and without batch normalisation train at small '
    'batches?',
    pathlib.Path(__file__).parent,
    answer,
  )
