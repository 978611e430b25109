"""Images in files of any format, prepared as evaluation prepares them."""

from collections.abc import Iterator, Sequence
from concurrent import futures
import itertools
import os
from typing import NamedTuple

from etils import epath
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from nfnet_jax import errors
from nfnet_jax import preprocessing as preprocessing_lib
from nfnet_jax.data import preprocess

# Files that are read ahead of the one that is asked for.
_AHEAD = 64
# Endings that Pillow lists, of files that it does not read as images.
_NO_IMAGES = {'.pdf', '.palm', '.mpg', '.mpeg'}


class MissingError(ValueError):
  """There is no such file, or no image in a folder."""


class Prepared(NamedTuple):
  """A file as the network sees it.

  Attributes:
    path: of the file.
    image: float32 `[S, S, 3]` in pixel units; None if it cannot be read.
    fault: why not, in one line; '' if it can.
  """

  path: str
  image: np.ndarray | None
  fault: str = ''


def find_images(arguments: Sequence[str]) -> list[str]:
  """Lists files, and all images in folders and theirs, in order of names.

  Links to folders inside of folders are not followed: they may go in circles.

  Args:
    arguments: files, of whatever ending, and folders; local or in a bucket.

  Raises:
    MissingError: naming what is not there, a folder that cannot be read, or one
      without images.
  """
  found = []
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

  Image.init()
  endings = Image.EXTENSION.keys() - _NO_IMAGES
  for parent, _, names in folder.walk(on_error=refuse):
    for name in names:
      if os.path.splitext(name)[1].lower() in endings:
        yield os.path.join(parent, name)


def read_image(path: str | os.PathLike) -> np.ndarray:
  """Reads the first frame of a file that Pillow knows, upright.

  Colours become RGB, whatever they were; transparency is dropped.

  Returns:
    uint8 `[H, W, 3]`.

  Raises:
    Exception: whatever Pillow raises.
  """
  with epath.Path(path).open('rb') as file, Image.open(file) as image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I;16'):
      # Pillow would clip these to 255.
      image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.asarray(image.convert('RGB'))


def prepare(
  paths: Sequence[str], preprocessing: preprocessing_lib.EvalPreprocessing
) -> Iterator[Prepared]:
  """Reads, crops and resizes images in the background, in their order.

  Args:
    paths: as from `find_images`.
    preprocessing: what is done to each image.

  Yields:
    A `Prepared` a path; those that cannot be read say why.
  """

  def one(path: str) -> Prepared:
    try:
      pixels = read_image(path)
    except UnidentifiedImageError:
      return Prepared(path, None, 'no format that Pillow knows')
    except Exception as error:  # Pillow's plugins raise anything.
      return Prepared(path, None, errors.one_line(error))
    crop = preprocess.CROPS[preprocessing.crop]
    image = crop(pixels, preprocessing.size, preprocessing.margin)
    return Prepared(path, image.numpy())

  with futures.ThreadPoolExecutor() as pool:
    remaining = iter(paths)
    waiting = [
      pool.submit(one, path) for path in itertools.islice(remaining, _AHEAD)
    ]
    while waiting:
      yield waiting.pop(0).result()
      waiting += [
        pool.submit(one, path) for path in itertools.islice(remaining, 1)
      ]
