"""Figure of a run's metrics."""

from __future__ import annotations

from collections.abc import Mapping
import os
from typing import Any

from etils import epath

from nfnet_jax import plotting
from nfnet_jax.training import metrics

# Title -> metric and label of each line.
_UPPER = {
  'loss': {'loss': 'training', 'eval/loss': 'raw', 'eval_ema/loss': 'EMA'},
  'top-1': {'top1': 'training', 'eval/top1': 'raw', 'eval_ema/top1': 'EMA'},
}
_LOWER = {
  'gradient norm': {'grad_norm': 'gradient norm'},
  'learning rate': {'learning_rate': 'learning rate'},
}


def plot(workdir: str | os.PathLike) -> epath.Path:
  """Write `WORKDIR/curves.png` from `metrics.jsonl` and return its path.

  Training metrics are averaged over 20 steps. Clipped units have a panel if the
  run has AGC.
  """
  folder = epath.Path(workdir)
  rows = metrics.read_metrics(folder / 'metrics.jsonl')
  clipping = _clipping_names(rows)
  lower = {'units clipped': clipping, **_LOWER} if clipping else _LOWER
  # A row of two panels above a row of two or three, of the same width.
  above = [title for title in _UPPER for _ in lower]
  below = [title for title in lower for _ in _UPPER]
  figure, axes = plotting.mosaic(
    [above, below], figsize=(10, 6.5), layout='constrained'
  )
  for title, names in {**_UPPER, **lower}.items():
    _draw(axes[title], title, names, rows)
  axes['gradient norm'].set_yscale('log')
  picture = folder / 'curves.png'
  plotting.save(figure, picture)
  return picture


def _draw(
  axis: Any, title: str, names: Mapping[str, str], rows: list[metrics.Row]
) -> None:
  """Draw metrics by step."""
  for name, label in names.items():
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
  axis.set(title=title, xlabel='step')
  axis.grid(alpha=0.3)
  if len(axis.lines) > 1:
    axis.legend()


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
