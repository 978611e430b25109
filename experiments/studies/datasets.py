"""The images of the studies."""

from __future__ import annotations

from nfnet_jax.data import sources
from nfnet_jax.storage import files


def data_dir() -> str:
  """Return the folder of the studies' TFDS datasets."""
  return str(files.cache_folder('studies') / 'tfds')


def prepare(name: str) -> None:
  """Build a dataset, unless it is there."""
  sources.load(name, data_dir())
