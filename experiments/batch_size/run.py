"""Train over batch sizes, with and without normalisation and AGC.

python -m experiments.batch_size.run
"""

from __future__ import annotations

import pathlib

import pandas as pd

from experiments.studies import figures, study, summaries, sweep, training

BATCHES = (16, 64, 256, 1024)
SEEDS = (0, 1, 2)
# The learning rate is proportional to the batch. At the smallest batch the
# network trains without clipping. AGC holds gains back that start at 0, so runs
# must be long: fewer epochs would measure that.
RATE, NFNET_RATE, RATE_BATCH = 0.05, 0.02, 64
EPOCHS, SIZE = 160, 16
BN, WITHOUT, WITH = 'BN', 'NF without AGC', 'NF with AGC'
THRESHOLDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
# Method -> model, learning rate at RATE_BATCH and thresholds.
METHODS = {
  BN: ('bn_resnet_pico', RATE, (0.0,)),
  WITHOUT: ('nf_resnet_pico', RATE, (0.0,)),
  WITH: ('nf_resnet_pico', RATE, THRESHOLDS),
  'NFNet without AGC': ('nfnet_nano', NFNET_RATE, (0.0,)),
  'NFNet with AGC': ('nfnet_nano', NFNET_RATE, (0.01,)),
}
TRAINED = 0.9  # Held-out accuracy that counts as trained.


def runs(quick: bool) -> list[training.Run]:
  """Return the runs over methods, thresholds, batches and seeds."""
  return [
    _run(method, threshold, batch, seed, quick)
    for method, (_, _, thresholds) in METHODS.items()
    for threshold in (thresholds[:1] if quick else thresholds)
    for batch in (BATCHES[1:2] if quick else BATCHES)
    for seed in (SEEDS[:1] if quick else SEEDS)
  ]


def _run(
  method: str, threshold: float, batch: int, seed: int, quick: bool
) -> training.Run:
  model, rate, _ = METHODS[method]
  return training.Run(
    labels={
      'method': method,
      'threshold': threshold,
      'batch': batch,
      'seed': seed,
    },
    config='digits',
    settings={
      'model.name': model,
      'data.image_size': SIZE,
      'data.eval_size': SIZE,
      'batch_size': batch,
      'dataset': 'digits',
      'seed': seed,
      'train_for': '10 steps' if quick else f'{EPOCHS} epochs',
      'optimizer.clipping': threshold,
      'optimizer.learning_rate': rate * batch / RATE_BATCH,
      **({'optimizer.warmup': '2 steps'} if quick else {}),
    },
  )


def answer(options: study.Options) -> str:
  """Train, draw, and return the verdict."""
  rows, _ = sweep.sweep(runs(options.quick), options.folder, options.workers)
  table = means(rows)
  draw(rows, table, options.folder)
  return verdict(rows, table)


def means(rows: pd.DataFrame) -> pd.DataFrame:
  """Return the mean accuracy with AGC, a row per threshold."""
  return rows[rows.method == WITH].pivot_table(
    index='threshold', columns='batch', values='top1'
  )


def best(rows: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
  """Return the rows with the best threshold for each batch, as in the paper."""
  chosen = rows.batch.map(table.idxmax())
  return rows[(rows.method != WITH) | (rows.threshold == chosen)]


def draw(rows: pd.DataFrame, table: pd.DataFrame, folder: pathlib.Path) -> None:
  """Draw accuracy by batch, and by batch and threshold."""
  figure, axes = figures.subplots(columns=3)
  resnets, nfnets, by_threshold = axes.flat
  chosen = best(rows, table).assign(percent=100 * rows.top1)
  for method, mine in chosen.groupby('method', sort=False):
    axis = nfnets if method.startswith('NFNet') else resnets
    figures.band(axis, mine, 'batch', 'percent', method)
  for axis in (resnets, nfnets):
    axis.set_xscale('log', base=2)
    axis.set_xticks(table.columns, table.columns)
    axis.set_xlabel('batch size')
    figures.chance(axis)
    axis.legend(loc='center left', fontsize=8)
  resnets.set_ylabel('held-out top-1 (%)')
  image = figures.heat_map(by_threshold, 100 * table, origin='lower')
  figures.write_values(by_threshold, 100 * table, '.1f')
  by_threshold.set(xlabel='batch size', ylabel='threshold of AGC')
  figure.colorbar(image, ax=by_threshold, label='held-out top-1 (%)')
  figures.titles(
    axes.flat, ('ResNet, best threshold', 'NFNet-nano', 'NF with AGC')
  )
  figures.save(figure, folder, 'results.png')


def verdict(rows: pd.DataFrame, table: pd.DataFrame) -> str:
  """Return where each method trains, and the best thresholds, in sentences."""
  text = [f'All seeds reach {TRAINED:.0%} at these batch sizes.']
  for method, mine in best(rows, table).groupby('method', sort=False):
    trained = summaries.trained_at(mine, 'batch', TRAINED)
    last = mine[mine.batch == mine.batch.max()].top1
    text.append(
      f'{method}: {trained}; at the largest {summaries.percent(last)}.'
    )
  parts = []
  for batch, mean in table.items():
    near = mean.index[mean >= mean.max() - 0.01]
    parts.append(
      f'{mean.idxmax():g} at batch {batch} (within a point of it '
      f'{near.min():g} to {near.max():g})'
    )
  return ' '.join([*text, f'Best threshold: {", ".join(parts)}.'])


if __name__ == '__main__':
  study.main(
    'Up to which batch size do networks train, and with which threshold?',
    pathlib.Path(__file__).parent,
    answer,
  )
