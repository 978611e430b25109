"""Train with AGC on some of the layers only.

python -m experiments.clipped_layers.run
"""

from __future__ import annotations

import pathlib

import pandas as pd

from experiments.studies import figures, study, summaries, sweep, training

# The network does not train at this rate without clipping. At smaller ones the
# skip gains stay near 0, and no branch matters.
RATE = 1.6
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
  """Return the runs over layers and seeds."""
  return [
    _run(layers, seed, quick)
    for layers in ((RECIPE, 'only the classifier') if quick else LAYERS)
    for seed in (SEEDS[:1] if quick else SEEDS)
  ]


def _run(layers: str, seed: int, quick: bool) -> training.Run:
  return training.Run(
    labels={'clipped_layers': layers, 'seed': seed},
    config='digits',
    settings={
      'model.name': MODEL,
      'dataset': 'digits',
      'seed': seed,
      'train_for': '20 steps' if quick else f'{EPOCHS} epochs',
      'optimizer.clipping': 0.0 if layers == NOTHING else THRESHOLD,
      'optimizer.learning_rate': RATE,
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
  """Draw the accuracy of every seed."""
  figure, axes = figures.subplots()
  rows = rows.assign(percent=100 * rows.top1)
  figures.seeds(axes[0, 0], rows, 'clipped_layers', 'percent')
  axes[0, 0].set(xlabel='held-out top-1 (%)', ylabel='clipped')
  figures.save(figure, folder, 'results.png')


def verdict(rows: pd.DataFrame) -> str:
  """Return the accuracies, in one sentence."""
  parts = [
    f'{layers.replace("...", RECIPE)} {summaries.percent(mine.top1)}'
    for layers, mine in rows.groupby('clipped_layers', sort=False)
  ]
  return f'Held-out top-1 if AGC clips {"; ".join(parts)}.'


if __name__ == '__main__':
  study.main(
    'Which layers must AGC clip?',
    pathlib.Path(__file__).parent,
    answer,
  )
