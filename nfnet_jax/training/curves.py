"""Figure of a run's metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
import os
import re
from typing import Any

from etils import epath

from nfnet_jax import plotting
from nfnet_jax.storage import run_files
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
_CLIPPED, _BY_LAYER = 'units clipped', 'units clipped by layer'
_MAX_LABELS = 25


def plot(workdir: str | os.PathLike) -> epath.Path:
  """Write `WORKDIR/curves.png` from `metrics.jsonl` and return its path.

  Training metrics are averaged over 20 steps. If the run has AGC, there is a
  panel with the shares of clipped units, and if they were logged by layer
  (`optimizer.clip_statistics`), a map of layers and steps.
  """
  folder = epath.Path(workdir)
  rows = metrics.read_metrics(folder / run_files.METRICS)
  shares = _clipping_names(rows)
  by_layer = {k: label for k, label in shares.items() if '/' in label}
  lines = {k: label for k, label in shares.items() if k not in by_layer}
  lower = {_CLIPPED: lines, **_LOWER} if lines else _LOWER
  # Rows of panels, each as wide as the figure.
  above = [title for title in _UPPER for _ in lower]
  below = [title for title in lower for _ in _UPPER]
  layout = [above, below] + [[_BY_LAYER] * len(above)] * bool(by_layer)
  figure, axes = plotting.mosaic(
    layout, figsize=(10, 3.25 * len(layout)), layout='constrained'
  )
  for title, names in {**_UPPER, **lower}.items():
    _draw(axes[title], title, names, rows)
  axes['gradient norm'].set_yscale('log')
  if by_layer:
    figure.colorbar(_draw_map(axes[_BY_LAYER], by_layer, rows))
  picture = folder / run_files.CURVES
  plotting.save(figure, picture)
  return picture


def _draw_map(
  axis: Any, names: Mapping[str, str], rows: list[metrics.Row]
) -> Any:
  """Draw the share of clipped units of each layer by step, input on top."""
  ordered = sorted(names, key=lambda name: network_order(names[name]))
  steps = [row for row in rows if row.get(ordered[0]) is not None]
  shares = [_smooth([row[name] for row in steps]) for name in ordered]
  first, last = steps[0]['step'], steps[-1]['step']
  image = axis.imshow(
    shares,
    aspect='auto',
    interpolation='nearest',
    extent=(first - 0.5, last + 0.5, len(ordered) - 0.5, -0.5),
    vmin=0,
    vmax=1,
  )
  every = math.ceil(len(ordered) / _MAX_LABELS)
  labels = [names[name].split('/~/', 1)[-1] for name in ordered]
  axis.set_yticks(range(0, len(ordered), every), labels[::every], fontsize=6)
  axis.set(title=_BY_LAYER, xlabel='step')
  return image


def network_order(layer: str) -> tuple[bool, bool, int, str]:
  """Return a key that sorts layers from a network's input to its output.

  Examples:
    >>> layers = 'Net/~/linear', 'Net/~/block_10/~/conv0', 'Net/~/stem_conv0'
    >>> sorted(layers, key=network_order)[0]
    'Net/~/stem_conv0'
  """
  module = layer.split('/~/')[1] if '/~/' in layer else layer
  is_stem = module.startswith(('stem', 'initial'))
  number = re.search(r'block_(\d+)$', module)
  return (
    not is_stem,
    'block' not in module,
    int(number[1]) if number else 0,
    layer,
  )


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


def _smooth(values: Sequence[float], window: int = 20) -> list[float]:
  """Average each value with the `window - 1` values before it."""
  smoothed = []
  for index in range(len(values)):
    recent = values[max(0, index + 1 - window) : index + 1]
    smoothed.append(sum(recent) / len(recent))
  return smoothed
