"""Count the units that AGC clips in every layer, for two networks.

python -m experiments.where_agc_clips.run
"""

from __future__ import annotations

import pathlib

import pandas as pd

from experiments.studies import figures, study, sweep, training
from nfnet_jax.training import curves

SEEDS = (0, 1, 2)
BATCHES = (64, 256)
# Name -> model.
NETWORKS = {
  'NFNet nano': 'nfnet_nano',
  'NF-ResNet, 24 blocks': 'nf_resnet_deep',
}
_RATE, _RATE_BATCH = 0.1, 64  # Of the README's first run.
_EPOCHS, _ROWS = 30, 27  # Rows of kept metrics per run.
_IMAGES = 1_442
_PREFIX = 'clipped/'


def runs(quick: bool) -> list[training.Run]:
  """Return the runs over networks, batches and seeds."""
  return [
    _run(network, batch, seed, quick)
    for network in NETWORKS
    for batch in (BATCHES[:1] if quick else BATCHES)
    for seed in (SEEDS[:1] if quick else SEEDS)
  ]


def _run(network: str, batch: int, seed: int, quick: bool) -> training.Run:
  steps = 20 if quick else _EPOCHS * _IMAGES // batch
  return training.Run(
    labels={'network': network, 'batch': batch, 'seed': seed},
    config='digits',
    settings={
      'model.name': NETWORKS[network],
      'batch_size': batch,
      'dataset': 'digits',
      'seed': seed,
      'train_for': f'{steps} steps',
      'optimizer.clipping': 0.01,
      'optimizer.clip_statistics': 'layer',
      'optimizer.learning_rate': _RATE * batch / _RATE_BATCH,
    },
    keep_steps=max(1, steps // _ROWS),
  )


def answer(options: study.Options) -> str:
  """Train, draw, and return the verdict."""
  rows, steps = sweep.sweep(
    runs(options.quick), options.folder, options.workers
  )
  draw(steps, options.folder)
  return verdict(rows, steps)


def shares(steps: pd.DataFrame, network: str, batch: int) -> pd.DataFrame:
  """Return the share of clipped units, a row per layer and a column per step.

  Means over seeds, from the network's input to its output.
  """
  mine = steps[(steps.network == network) & (steps.batch == batch)]
  columns = [name for name in mine if name.startswith(_PREFIX)]
  table = mine.groupby('step')[columns].mean().dropna(axis=1).T
  table.index = table.index.str.removeprefix(_PREFIX)
  return table.loc[sorted(table.index, key=curves.network_order)]


def draw(steps: pd.DataFrame, folder: pathlib.Path) -> None:
  """Draw a map of layers and steps for every network and batch."""
  batches = sorted(set(steps.batch))
  figure, axes = figures.subplots(columns=len(batches), rows=len(NETWORKS))
  for line, network in zip(axes, NETWORKS):
    for axis, batch in zip(line, batches):
      table = shares(steps, network, batch)
      table.index = table.index.str.split('/~/', n=1).str[-1]
      image = figures.heat_map(axis, table, vmin=0, vmax=1)
      axis.set(title=f'{network}, batch {batch}', xlabel='step')
      axis.title.set_fontsize(10)
  figure.colorbar(image, ax=axes, label='share of units clipped')
  figures.save(figure, folder, 'results.png')


def verdict(rows: pd.DataFrame, steps: pd.DataFrame) -> str:
  """Return the layers that are clipped most and least, in sentences."""
  text = []
  for network in NETWORKS:
    for batch in sorted(set(steps.batch)):
      mean = shares(steps, network, batch).mean(axis=1).sort_values()
      name = lambda layer: layer.split('/~/', 1)[-1]
      mine = rows[(rows.network == network) & (rows.batch == batch)]
      text.append(
        f'{network}, batch {batch}: {mine.clipped.mean():.0%} of all units, '
        f'most in {name(mean.index[-1])} ({mean.iloc[-1]:.0%}), least '
        f'in {name(mean.index[0])} ({mean.iloc[0]:.0%}); top-1 '
        f'{mine.top1.mean():.1%}.'
      )
  return ' '.join(text)


if __name__ == '__main__':
  study.main(
    'In which layers, and when, does AGC clip?',
    pathlib.Path(__file__).parent,
    answer,
  )
