"""Figures drawn without a display and written atomically."""

from __future__ import annotations

import os
from typing import Any

from nfnet_jax.storage import files


def subplots(*args: Any, **options: Any) -> tuple[Any, Any]:
  """Return matplotlib's `(figure, axes)` for its arguments of `subplots`."""
  return _pyplot().subplots(*args, **options)


def mosaic(*args: Any, **options: Any) -> tuple[Any, Any]:
  """Return matplotlib's `(figure, axes)` for those of `subplot_mosaic`."""
  return _pyplot().subplot_mosaic(*args, **options)


def _pyplot() -> Any:
  # matplotlib takes long to import, so it is imported here.
  import matplotlib

  matplotlib.use('agg')
  from matplotlib import pyplot

  return pyplot


def save(figure: Any, path: str | os.PathLike, dpi: int = 110) -> None:
  """Write a figure of `subplots` as a .png file, and close it."""
  with files.atomically(path) as temporary:
    figure.savefig(temporary, dpi=dpi, format='png')
  _pyplot().close(figure)
