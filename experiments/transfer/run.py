"""Measure the effect of pre-training with and without batch normalisation.

python -m experiments.transfer.run
"""

from __future__ import annotations

import pathlib
from typing import Any

import pandas as pd

from experiments.studies import (
  datasets,
  figures,
  study,
  summaries,
  sweep,
  training,
)

MODELS = {'NF': 'nf_resnet_pico', 'BN': 'bn_resnet_pico'}
SEEDS = (0, 1, 2, 3, 4)
PRETRAINED, SCRATCH = 'pre-trained', 'from scratch'
# The same learning rates are tried for every network and start.
PRETRAINING_RATES = (0.0125, 0.025, 0.05, 0.1)
RATES = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4)
STEPS = 200
# How late skip gains grow under AGC.
AGC_RATES, EPS = (0.025, 0.1, 0.4, 1.6), (0.001, 0.01, 0.1)
# Differences from the published recipes, for small greyscale images.
_SMALL: dict[str, Any] = {
  'batch_size': 64,
  'data.crop': 'whole',
  'data.flip': False,
  'data.shift': 3,
  'data.eval_margin': 0,
  'data.eval_split': 'test',
  'data.image_size': 32,
  'data.eval_size': 32,
  'data.shards': 8,
  'ema_decay': 0.99,
  'optimizer.clipping': 0.0,
}


def pretraining(quick: bool) -> list[training.Run]:
  """Return the runs on MNIST-5k over networks, rates and seeds."""
  return [
    training.Run(
      labels={'method': method, 'learning_rate': rate, 'seed': seed},
      config='pretrain:resnet',
      settings={
        **_SMALL,
        'model.name': model,
        'dataset': datasets.MNIST,
        'seed': seed,
        'train_for': '20 steps' if quick else '10 epochs',
        'optimizer.learning_rate': rate,
        'optimizer.warmup': '2 steps' if quick else '1 epoch',
      },
      save=True,
    )
    for method, model in MODELS.items()
    for rate in (PRETRAINING_RATES[1:2] if quick else PRETRAINING_RATES)
    for seed in (SEEDS[:1] if quick else SEEDS)
  ]


def transfer(rows: pd.DataFrame, quick: bool) -> list[training.Run]:
  """Return the runs on the UCI digits over networks, starts, rates and seeds.

  Args:
    rows: of the pre-training. The runs start from the networks of the rate that
      is best on MNIST.
    quick: whether to make few and short runs.
  """
  result = []
  for method, model in MODELS.items():
    mine = rows[rows.method == method]
    best = mine.groupby('learning_rate').top1.mean().idxmax()
    keys = mine[mine.learning_rate == best].set_index('seed').run
    for start in (PRETRAINED, SCRATCH):
      for rate in RATES[1:2] if quick else RATES:
        for seed, key in keys.items():
          values = {'method': method, 'start': start, 'learning_rate': rate}
          first = (
            {'weights': key} if start == PRETRAINED else {'model.name': model}
          )
          result.append(_on_digits(values, rate, seed, first, quick))
  return result


def slow_starts(quick: bool) -> list[training.Run]:
  """Return the runs with AGC over rates and eps, from scratch."""
  return [
    _on_digits(
      {'learning_rate': rate, 'eps': eps},
      rate,
      seed,
      {'model.name': MODELS['NF'], 'optimizer.clipping': 0.01},
      quick,
      eps,
    )
    for rate in (AGC_RATES[:1] if quick else AGC_RATES)
    for eps in (EPS[:1] if quick else EPS)
    for seed in (SEEDS[:1] if quick else SEEDS[:3])
  ]


def _on_digits(
  labels: dict[str, Any],
  rate: float,
  seed: int,
  settings: dict[str, Any],
  quick: bool,
  eps: float = 1e-3,
) -> training.Run:
  steps = 20 if quick else STEPS
  return training.Run(
    labels={**labels, 'seed': seed},
    config='finetune',
    settings={
      **_SMALL,
      'dataset': 'digits',
      'seed': seed,
      'train_for': f'{steps} steps',
      'optimizer.warmup': f'{steps // 3} steps',
      'optimizer.learning_rate': rate,
      **settings,
    },
    eps=eps,
  )


def answer(options: study.Options) -> str:
  """Train, draw, and return the verdict."""
  quick, folder, workers = options.quick, options.folder, options.workers
  first, _ = sweep.sweep(pretraining(quick), folder / 'pretraining', workers)
  rows, _ = sweep.sweep(transfer(first, quick), folder, workers)
  slow, _ = sweep.sweep(slow_starts(quick), folder / 'slow_starts', workers)
  draw(rows, slow, folder)
  return verdict(rows, slow)


def draw(rows: pd.DataFrame, slow: pd.DataFrame, folder: pathlib.Path) -> None:
  """Draw accuracy by rate and start, and the gains by rate and eps."""
  rows = rows.assign(percent=100 * rows.top1)
  figure, axes = figures.subplots(columns=3)
  for axis, start in zip(axes.flat, (PRETRAINED, SCRATCH)):
    for method, mine in rows[rows.start == start].groupby('method', sort=False):
      figures.band(axis, mine, 'learning_rate', 'percent', method)
    axis.set(xscale='log', ylim=(0, 102), xlabel='learning rate')
    axis.set_xticks(RATES, RATES, fontsize=8)
    axis.minorticks_off()
    figures.chance(axis)
  axes[0, 0].set_ylabel('held-out top-1 (%)')
  axes[0, 0].legend(loc='center left')
  for eps, mine in slow.groupby('eps'):
    figures.band(axes[0, 2], mine, 'learning_rate', 'skip_gain', f'eps {eps:g}')
  axes[0, 2].set(xscale='log', yscale='log', xlabel='learning rate')
  axes[0, 2].legend(fontsize=8)
  figures.titles(
    axes.flat,
    (PRETRAINED, SCRATCH, f'skip gain with AGC after {STEPS} steps'),
  )
  figures.save(figure, folder, 'results.png')


def verdict(rows: pd.DataFrame, slow: pd.DataFrame) -> str:
  """Return the accuracies at the best rates, in sentences."""
  text = []
  for (method, start), mine in rows.groupby(['method', 'start'], sort=False):
    rate = mine.groupby('learning_rate').top1.mean().idxmax()
    top1 = mine[mine.learning_rate == rate].top1
    text.append(
      f'{method} {start}: {summaries.percent(top1)} at its best rate {rate:g}'
    )
  gains = slow.groupby(['eps', 'learning_rate']).skip_gain.mean()
  parts = [
    f'{gains[eps].min():.1g} to {gains[eps].max():.1g} with eps {eps:g}'
    for eps in sorted(set(slow.eps))
  ]
  return (
    f'{"; ".join(text)}. With AGC the mean skip gain reaches '
    f'{", ".join(parts)}, from the smallest to the largest rate.'
  )


if __name__ == '__main__':
  study.main(
    'Does pre-training help more without batch normalisation?',
    pathlib.Path(__file__).parent,
    answer,
  )
