"""The look of the studies' figures."""

from __future__ import annotations

from collections.abc import Sequence
import math
import pathlib
from typing import Any

from matplotlib import patheffects
import pandas as pd

from nfnet_jax import plotting

# Colours of Okabe and Ito, which colour-blind readers can tell apart; a marker
# and a colour belong to a method in all figures.
_STYLES = {
  'AGC': ('#0072B2', 'o'),
  'AGC 0.1': ('#56B4E9', 'D'),
  'none': ('#D55E00', 's'),
  'global norm': ('#009E73', '^'),
  'layer': ('#CC79A7', 'v'),
  'input unit': ('#F0E442', 'D'),
  'LARS': ('#E69F00', 'P'),
  'BN': ('#000000', 'X'),
  'NF': ('#0072B2', 'o'),
  'NF without weight standardisation': ('#D55E00', 's'),
  'NF without gamma': ('#009E73', '^'),
  'NF without alpha and beta': ('#E69F00', 'P'),
  'FixUp': ('#CC79A7', 'v'),
  'SkipInit': ('#56B4E9', 'D'),
  'NF with AGC': ('#0072B2', 'o'),
  'NF without AGC': ('#D55E00', 's'),
  'NFNet with AGC': ('#0072B2', 'o'),
  'NFNet without AGC': ('#D55E00', 's'),
  'eps 0.001': ('#0072B2', 'o'),
  'eps 0.01': ('#E69F00', 's'),
  'eps 0.1': ('#000000', '^'),
  'NFNet': ('#0072B2', 'o'),
  'EfficientNet': ('#D55E00', 's'),
  'ResNet-50': ('#000000', 'X'),
  'SENet-50': ('#009E73', '^'),
  'planned': ('#0072B2', ''),
  'measured': ('#E69F00', ''),
}
_OUTLINE = patheffects.withStroke(linewidth=2, foreground='black')
_CHANCE = 10  # Percent; all datasets of the studies have ten classes.
_WIDTH, _HEIGHT, _DPI = 9.0, 3.4, 110


def subplots(columns: int = 1, rows: int = 1, **options: Any) -> Any:
  """Return a figure of README width and an array of its axes."""
  figure, axes = plotting.subplots(
    rows,
    columns,
    figsize=(_WIDTH, _HEIGHT * rows),
    layout='constrained',
    squeeze=False,
    **options,
  )
  for axis in axes.flat:
    axis.grid(alpha=0.25)
    axis.spines[['top', 'right']].set_visible(False)
  return figure, axes


def band(
  axis: Any,
  rows: pd.DataFrame,
  x: str,
  y: str,
  method: str,
  markers: bool = True,
) -> None:
  """Draw the mean over seeds as a line, and all seeds as a band."""
  colour, marker = _STYLES[method]
  seeds = rows.groupby(x)[y]
  mean = seeds.mean()
  axis.plot(
    mean.index,
    mean,
    color=colour,
    marker=marker if markers else '',
    markersize=5,
    label=method,
  )
  axis.fill_between(
    mean.index, seeds.min(), seeds.max(), color=colour, alpha=0.2, linewidth=0
  )


def line(
  axis: Any,
  x: pd.Series,
  y: pd.Series,
  method: str,
  label: str | None = None,
  dashed: bool = False,
) -> None:
  """Draw points, and a line through them."""
  colour, marker = _STYLES[method]
  axis.plot(
    x,
    y,
    color=colour,
    marker=marker,
    markersize=5,
    linestyle='--' if dashed else '-',
    label=label or method,
  )


def bars(axis: Any, x: Sequence[float], heights: pd.Series, name: str) -> None:
  """Draw bars with their heights above them."""
  colour, _ = _STYLES[name]
  drawn = axis.bar(x, heights, width=0.38, color=colour, label=name)
  axis.bar_label(drawn, fmt='%.0f', fontsize=8)


def heat_map(axis: Any, table: pd.DataFrame, **options: Any) -> Any:
  """Draw a table as a map, and return the image for a colour bar.

  At most about 25 rows and 6 columns are labelled.
  """
  axis.grid(visible=False)
  image = axis.imshow(table, aspect='auto', interpolation='nearest', **options)
  for labels, ticks, most in (
    (table.index, axis.set_yticks, 25),
    (table.columns, axis.set_xticks, 6),
  ):
    every = math.ceil(len(labels) / most)
    ticks(range(0, len(labels), every), labels[::every], fontsize=7)
  return image


def write_values(axis: Any, table: pd.DataFrame, form: str) -> None:
  """Write the values of a table into its map."""
  for y, (_, line) in enumerate(table.iterrows()):
    for x, value in enumerate(line):
      text = axis.text(x, y, format(value, form), ha='center', va='center')
      text.set(fontsize=8, color='white', path_effects=[_OUTLINE])


def seeds(axis: Any, rows: pd.DataFrame, name: str, value: str) -> None:
  """Draw the mean of each name as a bar, and every seed as a point.

  The first name stands at the top.
  """
  names = list(dict.fromkeys(rows[name]))[::-1]
  mean = rows.groupby(name)[value].mean()
  axis.barh(names, mean[names], height=0.6, color='#56B4E9')
  axis.plot(rows[value], rows[name], 'o', color='black', markersize=3)


def chance(axis: Any) -> None:
  """Mark the accuracy of guessing, in percent."""
  axis.axhline(_CHANCE, color='grey', linestyle=':', linewidth=1)
  axis.annotate(
    'chance',
    (0.01, _CHANCE),
    xycoords=('axes fraction', 'data'),
    xytext=(0, 3),
    textcoords='offset points',
    color='grey',
    fontsize=8,
  )


def legend_below(figure: Any, axis: Any) -> None:
  """Write the legend of an axis below all axes of a figure."""
  handles, labels = axis.get_legend_handles_labels()
  figure.legend(
    handles, labels, loc='outside lower center', ncols=3, fontsize=8
  )


def save(figure: Any, folder: pathlib.Path, name: str) -> None:
  """Write a figure as `FOLDER/NAME`."""
  plotting.save(figure, folder / name, dpi=_DPI)


def smooth(values: pd.Series, window: int) -> pd.Series:
  """Average each value with the values before it."""
  return values.rolling(window, min_periods=1).mean()


def titles(axes: Sequence[Any], names: Sequence[str]) -> None:
  """Set the titles of axes."""
  for axis, name in zip(axes, names):
    axis.set_title(name, fontsize=10)
