"""Images in files of any format, preprocessed as in evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent import futures
import itertools
import os
from typing import NamedTuple

from etils import epath
import numpy as np

from nfnet_jax import errors
from nfnet_jax import preprocessing as preprocessing_lib
from nfnet_jax.data import devices, formats, preprocess

# Files that are read ahead.
_AHEAD = 64


class MissingError(ValueError):
  """There is no such file, or no image in a folder."""


class Prepared(NamedTuple):
  """A preprocessed file.

  Attributes:
    path: path of the file.
    image: float32 `[S, S, 3]` in pixel units; None if it cannot be read.
    fault: reason why it cannot be read, in one line; '' if it can.
  """

  path: str
  image: np.ndarray | None
  fault: str = ''


def find_images(arguments: Sequence[str]) -> list[str]:
  """List files, and the images in folders and subfolders sorted by name.

  Links to folders inside of folders are not followed, because they may form
  cycles.

  Args:
    arguments: files, with any ending, and folders; local or in a bucket.

  Raises:
    MissingError: naming a missing file, a folder that cannot be read, or one
      without images.
  """
  found: list[str] = []
  for argument in arguments:
    path = epath.Path(argument)
    if path.is_dir():
      images = sorted(_images_under(path))
      if not images:
        raise MissingError(f"There are no images in '{argument}'.")
      found += images
    elif path.exists():
      found.append(os.fspath(path))
    else:
      raise MissingError(f"There is no image or folder '{argument}'.")
  return found


def _images_under(folder: epath.Path) -> Iterator[str]:
  def refuse(error: OSError):
    raise MissingError(errors.one_line(error)) from error

  for parent, _, names in folder.walk(on_error=refuse):
    for name in names:
      if formats.is_image(name):
        yield os.path.join(parent, name)


def read_image(path: str | os.PathLike) -> np.ndarray:
  """Read a file, local or in a bucket, as `formats.decode` does."""
  with epath.Path(path).open('rb') as file:
    return formats.decode(file)


def prepare(
  paths: Sequence[str], preprocessing: preprocessing_lib.EvalPreprocessing
) -> Iterator[Prepared]:
  """Read, crop and resize images in the background, in their order.

  Also hides accelerators from TensorFlow.

  Args:
    paths: files, as from `find_images`.
    preprocessing: preprocessing of each image.

  Yields:
    A `Prepared` per path, with the reason where a file cannot be read.
  """
  devices.hide_accelerators()

  def read_and_crop(path: str) -> Prepared:
    try:
      pixels = read_image(path)
    except Exception as error:
      return Prepared(path, None, formats.describe_error(error))
    return Prepared(path, preprocess.crop(pixels, preprocessing).numpy())

  with futures.ThreadPoolExecutor() as pool:
    remaining = iter(paths)
    submit = lambda count: [
      pool.submit(read_and_crop, path)
      for path in itertools.islice(remaining, count)
    ]
    waiting = submit(_AHEAD)
    while waiting:
      yield waiting.pop(0).result()
      waiting += submit(1)
