"""Train with AGC on some of the layers only.

python -m experiments.clipped_layers.run
"""

from __future__ import annotations

import pathlib

import pandas as pd

from experiments.studies import figures, study, summaries, sweep, training

# Rates at which the network does not train without clipping.
RATES = (0.1, 0.8)
SEEDS = (0, 1, 2)
MODEL, THRESHOLD, EPOCHS = 'nfnet_nano', 0.01, 30
_KERNEL, _STEM = 'NFNet/~/linear/w', 'stem_conv0'
_STAGES = ('/nf_block/', '/nf_block_1/', '/nf_block_[234]/', '/nf_block_5/')


def _all_but(*patterns: str) -> str:
  return f'^(?!.*({"|".join(patterns)}))'


NOTHING, RECIPE = 'nothing', 'all but the classifier'
# What is clipped -> regular expression of its parameters.
LAYERS = {
  'everything': '.',
  RECIPE: '',
  '... and the first convolution': _all_but(_KERNEL, _STEM),
  **{
    f'... and stage {number}': _all_but(_KERNEL, stage)
    for number, stage in enumerate(_STAGES, start=1)
  },
  'only the classifier': _KERNEL,
  NOTHING: '',
}


def runs(quick: bool) -> list[training.Run]:
  """Return the runs over layers, rates and seeds."""
  return [
    _run(layers, rate, seed, quick)
    for layers in ((RECIPE, 'only the classifier') if quick else LAYERS)
    for rate in (RATES[:1] if quick else RATES)
    for seed in (SEEDS[:1] if quick else SEEDS)
  ]


def _run(layers: str, rate: float, seed: int, quick: bool) -> training.Run:
  return training.Run(
    labels={'clipped_layers': layers, 'learning_rate': rate, 'seed': seed},
    config='digits',
    settings={
      'model.name': MODEL,
      'dataset': 'digits',
      'seed': seed,
      'train_for': '20 steps' if quick else f'{EPOCHS} epochs',
      'optimizer.clipping': 0.0 if layers == NOTHING else THRESHOLD,
      'optimizer.learning_rate': rate,
      **({'optimizer.warmup': '2 steps'} if quick else {}),
    },
    clipped=LAYERS[layers],
  )


def answer(options: study.Options) -> str:
  """Train, draw, and return the verdict."""
  rows, _ = sweep.sweep(runs(options.quick), options.folder, options.workers)
  draw(rows, options.folder)
  return verdict(rows)


def draw(rows: pd.DataFrame, folder: pathlib.Path) -> None:
  """Draw the accuracy of every seed, a panel per learning rate."""
  rows = rows.assign(percent=100 * rows.top1)
  rates = sorted(set(rows.learning_rate))
  figure, axes = figures.subplots(columns=len(rates), sharey=True)
  for axis, rate in zip(axes.flat, rates):
    mine = rows[rows.learning_rate == rate]
    figures.seeds(axis, mine, 'clipped_layers', 'percent')
    axis.set_xlabel('held-out top-1 (%)')
  axes[0, 0].set_ylabel('clipped')
  figures.titles(axes.flat, [f'learning rate {rate:g}' for rate in rates])
  figures.save(figure, folder, 'results.png')


def verdict(rows: pd.DataFrame) -> str:
  """Return the accuracies, in sentences."""
  text = []
  for rate, mine in rows.groupby('learning_rate'):
    parts = [
      f'{layers.replace("...", RECIPE)} {summaries.percent(group.top1)}'
      for layers, group in mine.groupby('clipped_layers', sort=False)
    ]
    text.append(f'Clipped at rate {rate:g}: {"; ".join(parts)}.')
  return ' '.join(text)


if __name__ == '__main__':
  study.main(
    'Which layers must AGC clip?',
    pathlib.Path(__file__).parent,
    answer,
  )
