"""Figure of a run's metrics."""

from __future__ import annotations

import os

from etils import epath

from nfnet_jax import plotting
from nfnet_jax.training import metrics

_PANELS = (
  ('loss', {'loss': 'training', 'eval/loss': 'raw', 'eval_ema/loss': 'EMA'}),
  ('top-1', {'top1': 'training', 'eval/top1': 'raw', 'eval_ema/top1': 'EMA'}),
  ('units clipped', None),
  ('learning rate', {'learning_rate': 'learning rate'}),
)


def plot(workdir: str | os.PathLike) -> epath.Path:
  """Write `WORKDIR/curves.png` from `metrics.jsonl` and return its path.

  Training metrics are averaged over 20 steps.
  """
  folder = epath.Path(workdir)
  rows = metrics.read_metrics(folder / 'metrics.jsonl')
  figure, axes = plotting.subplots(2, 2, figsize=(10, 6.5), sharex=True)
  for axis, (title, names) in zip(axes.flat, _PANELS):
    for name, label in (names or _clipping_names(rows)).items():
      points = [
        (row['step'], row[name]) for row in rows if row.get(name) is not None
      ]
      if points:
        steps, values = zip(*points)
        is_evaluation = name.startswith('eval')
        is_noisy = not is_evaluation and name != 'learning_rate'
        axis.plot(
          steps,
          _smooth(values) if is_noisy else values,
          marker='o' if is_evaluation else '',
          label=label,
        )
    axis.set_title(title)
    axis.grid(alpha=0.3)
    if len(axis.lines) > 1:
      axis.legend()
  for axis in axes[-1]:
    axis.set_xlabel('step')
  figure.tight_layout()
  picture = folder / 'curves.png'
  plotting.save(figure, picture)
  return picture


def _clipping_names(rows: list[metrics.Row]) -> dict[str, str]:
  names = dict.fromkeys(name for row in rows for name in row)
  clipped = [name for name in names if name.startswith('clipped')]
  return {name: name.partition('/')[2] or 'all' for name in clipped}


def _smooth(values: tuple[float, ...], window: int = 20) -> list[float]:
  """Average each value with the `window - 1` values before it."""
  smoothed = []
  for index in range(len(values)):
    recent = values[max(0, index + 1 - window) : index + 1]
    smoothed.append(sum(recent) / len(recent))
  return smoothed
