"""Sentences about results."""

from __future__ import annotations

import pandas as pd


def trained_at(rows: pd.DataFrame, x: str, least: float) -> str:
  """Return the values of a column at which all seeds reach an accuracy."""
  worst = rows.groupby(x).top1.min()
  trained = worst.index[worst >= least]
  return ', '.join(f'{value:g}' for value in trained) or 'nowhere'


def percent(values: pd.Series) -> str:
  """Return mean and range of shares, as '98.9 % (98.3 to 99.2)'."""
  values = 100 * values
  return f'{values.mean():.1f} % ({values.min():.1f} to {values.max():.1f})'
