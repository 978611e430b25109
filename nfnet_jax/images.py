"""Images in files of any format, preprocessed as in evaluation.

Prediction needs no TensorFlow, so `crop` does in NumPy what
`data/preprocess.py` does in TensorFlow; pixels differ by at most 0.001 of 255.
Those of JPEGs differ more, by 1 on average and by up to 6 in photographs:
TensorFlow decodes them by a fast, inexact transform, as in the published
evaluation, and Pillow by the exact one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent import futures
import functools
import io
import itertools
import os
from typing import IO, NamedTuple

from etils import epath
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from nfnet_jax import errors
from nfnet_jax import preprocessing as preprocessing_lib

# Files that are read ahead.
_AHEAD = 64
# TensorFlow rounds the distance to a pixel to this part of a pixel.
_STEPS_PER_PIXEL = 1024
# Endings that Pillow lists but does not read as images everywhere.
_NO_IMAGES = {
  *('.bufr', '.emf', '.eps', '.grib', '.h5', '.hdf', '.mpeg', '.mpg'),
  *('.palm', '.pdf', '.ps', '.wmf'),
}


class MissingError(ValueError):
  """There is no such file, or no image in a folder."""


class ImageError(ValueError):
  """An image cannot be used; the message says why in one line."""


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
      if is_image(name):
        yield os.path.join(parent, name)


@functools.cache
def _endings() -> frozenset[str]:
  Image.init()
  return frozenset(Image.EXTENSION.keys() - _NO_IMAGES)


def is_image(name: str) -> bool:
  """Return whether a file has the ending of an image.

  Examples:
    >>> is_image('a.WEBP'), is_image('a.txt')
    (True, False)
  """
  return os.path.splitext(name)[1].lower() in _endings()


def read_image(path: str | os.PathLike) -> np.ndarray:
  """Read an image of any format that Pillow knows; see `decode`."""
  with epath.Path(path).open('rb') as file:
    return decode(file)


def decode(file: IO[bytes]) -> np.ndarray:
  """Decode the first frame of an image in any format of Pillow, upright.

  Colours are converted to RGB; transparency is dropped.

  Returns:
    uint8 `[H, W, 3]`.

  Raises:
    Exception: any error of Pillow's.
  """
  with Image.open(file) as opened:
    return _to_rgb(opened)


def _to_rgb(opened: Image.Image) -> np.ndarray:
  image: Image.Image = ImageOps.exif_transpose(opened)
  if image.mode.startswith('I;16'):
    # Pillow would clip these to 255.
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  return np.asarray(image.convert('RGB'))


def preprocess(
  image: str | os.PathLike | np.ndarray | Image.Image,
  preprocessing: preprocessing_lib.EvalPreprocessing,
) -> np.ndarray:
  """Read, crop and resize an image for evaluation.

  Args:
    image: a file, local or in a bucket; a Pillow image; or an array `[H, W, 3]`
      of pixels 0 to 255.
    preprocessing: size, crop and margin.

  Returns:
    float32 `[size, size, 3]`, pixels 0 to 255 (a few lie beyond).

  Raises:
    ImageError: if it cannot be read, or is no such array.
  """
  if isinstance(image, (str, os.PathLike)):
    try:
      pixels = read_image(image)
    except Exception as error:  # Pillow's plugins raise errors of any kind.
      raise ImageError(f"'{image}' cannot be read: {_fault(error)}.") from error
  elif isinstance(image, Image.Image):
    pixels = _to_rgb(image)
  else:
    pixels = np.asarray(image)
    _check_pixels(pixels)
  return crop(pixels, preprocessing)


def _check_pixels(pixels: np.ndarray) -> None:
  if pixels.ndim != 3 or pixels.shape[-1] != 3 or not pixels.size:
    raise ImageError(
      f'An image is an array [H, W, 3], not {list(pixels.shape)}.'
    )
  # An image that is all black does not show its range.
  if np.issubdtype(pixels.dtype, np.floating) and 0 < pixels.max() <= 1:
    raise ImageError('Pixels are 0 to 255, not 0 to 1. Multiply them by 255.')


def find_fault(encoded: bytes) -> str:
  """Return why an image cannot be decoded, in one line; '' if it can.

  A JPEG is decoded at a small size, which is fast and reads the whole file.
  """
  try:
    with Image.open(io.BytesIO(encoded)) as opened:
      opened.draft(None, (1, 1))
      opened.load()
  except Exception as error:  # Pillow's plugins raise errors of any kind.
    return _fault(error)
  return ''


def _fault(error: Exception) -> str:
  if isinstance(error, UnidentifiedImageError):
    return 'no format that Pillow knows'
  return errors.one_line(error)


def crop(
  image: np.ndarray, preprocessing: preprocessing_lib.EvalPreprocessing
) -> np.ndarray:
  """Crop and resize an image for evaluation, to float32 `[size, size, 3]`.

  Args:
    image: `[H, W, 3]`.
    preprocessing: size, crop and margin.
  """
  size, margin = preprocessing.size, preprocessing.margin
  if preprocessing.crop == 'centre':
    shorter = min(image.shape[:2])
    # In single precision, or the product may be rounded to the next integer.
    side = max(1, int(np.float32(size / (size + margin)) * np.float32(shorter)))
    y, x = ((extent - side + 1) // 2 for extent in image.shape[:2])
    return _resize(image[y : y + side, x : x + side], size)
  start = margin // 2
  resized = _resize(image, size + margin)
  return resized[start : start + size, start : start + size]


def _resize(image: np.ndarray, size: int) -> np.ndarray:
  """Resize to float32 `[size, size, 3]`, bicubic without antialiasing."""
  rows, row_weights = _neighbours(image.shape[0], size)
  columns, column_weights = _neighbours(image.shape[1], size)
  tall = sum(
    weight[:, None, None] * image[row]
    for row, weight in zip(rows, row_weights, strict=True)
  )
  return sum(
    weight[:, None] * tall[:, column]
    for column, weight in zip(columns, column_weights, strict=True)
  )


def _neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
  """Return which pixels of a line of `old` make each of a line of `new`.

  Returns:
    Indices and weights, each `[4, new]`: cubic convolution with a = -0.5 (Keys,
    1981), where pixels beyond the border have no weight.
  """
  centres = np.arange(new, dtype=np.float32) + np.float32(0.5)
  places = centres * (np.float32(old) / np.float32(new)) - np.float32(0.5)
  before = np.floor(places)
  rest = np.rint((places - before) * _STEPS_PER_PIXEL) / _STEPS_PER_PIXEL
  distances = np.stack([1 + rest, rest, 1 - rest, 2 - rest])
  near = (1.5 * distances - 2.5) * distances**2 + 1
  far = ((-0.5 * distances + 2.5) * distances - 4) * distances + 2
  indices = before.astype(int) + np.arange(-1, 3)[:, None]
  is_inside = (indices >= 0) & (indices < old)
  weights = np.where(distances <= 1, near, far) * is_inside
  weights /= weights.sum(axis=0)
  return indices.clip(0, old - 1), weights.astype(np.float32)


def prepare(
  paths: Sequence[str], preprocessing: preprocessing_lib.EvalPreprocessing
) -> Iterator[Prepared]:
  """Read, crop and resize images in the background, in their order.

  Args:
    paths: files, as from `find_images`.
    preprocessing: preprocessing of each image.

  Yields:
    A `Prepared` per path, with the reason where a file cannot be read.
  """

  def read_and_crop(path: str) -> Prepared:
    try:
      pixels = read_image(path)
    except Exception as error:  # Pillow's plugins raise errors of any kind.
      return Prepared(path, None, _fault(error))
    return Prepared(path, crop(pixels, preprocessing))

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
