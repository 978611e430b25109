"""Pictures that are drawn without a screen, and appear whole or not at all."""

import os

from nfnet_jax.storage import files


def subplots(*args, **options):
  """Does what matplotlib's does, which takes long to import."""
  import matplotlib

  matplotlib.use('agg')
  from matplotlib import pyplot

  return pyplot.subplots(*args, **options)


def save(figure, path: str | os.PathLike, dpi: int = 110) -> None:
  """Writes a figure of `subplots` as a .png, and closes it."""
  from matplotlib import pyplot

  with files.atomically(path) as temporary:
    figure.savefig(temporary, dpi=dpi, format='png')
  pyplot.close(figure)
