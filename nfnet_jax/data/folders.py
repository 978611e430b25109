"""A folder of images by class, as a dataset."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import hashlib
import os

import tensorflow as tf
import tensorflow_datasets as tfds

from nfnet_jax import images as images_lib
from nfnet_jax.data import formats, sources

# Where images that are left out lie, in place of an ending.
ELSEWHERE = 'images outside SPLIT/CLASS/ and CLASS/'


@dataclasses.dataclass
class Listing:
  """The contents of a folder; hidden files are not in it.

  Attributes:
    images: (split, class, path) of each image.
    left_out: ending, or `ELSEWHERE` -> paths of files that are not used.
    empty: folders without any file, of a split or a class.
  """

  images: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
  left_out: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  empty: list[str] = dataclasses.field(default_factory=list)


class FolderSource(sources.Source):
  """Images in `ROOT/SPLIT/CLASS/`, or in `ROOT/CLASS/` as the split 'train'.

  The classes are the folders of all splits, sorted by name. The images of a
  split are sorted by a hash of their paths, so that a slice such as
  'train[:10%]' holds all classes.

  Attributes:
    listing: what the folder contains.
  """

  def __init__(self, root: str):
    """List the folder, which may be in a bucket.

    Raises:
      sources.MissingDatasetError: if it holds no images by class.
    """
    root = root.rstrip('/')
    self.listing = _list(root)
    images = self.listing.images
    if not images:
      raise sources.MissingDatasetError(
        f"'{root}' holds no images in SPLIT/CLASS/ or CLASS/. Put them there, "
        'with endings such as .jpg, .png or .webp.'
      )
    names = sorted({class_name for _, class_name, _ in images})
    label = {name: index for index, name in enumerate(names)}
    by_split: dict[str, list[bytes]] = {}
    for split, class_name, path in sorted(images, key=_hash):
      line = f'{label[class_name]}\t{path}'.encode()
      by_split.setdefault(split, []).append(line)
    super().__init__(root, names, _splits(by_split))
    self._offsets: dict[str, int] = {}
    self._lines: list[bytes] = []
    for split, lines in by_split.items():
      (file,) = self._file_slices(split)
      self._offsets[file.path] = len(self._lines)
      self._lines += lines

  def shards(self, split: str, count: int) -> list[list[sources.FileSlice]]:
    """Cut a split into `count` fixed parts whose sizes differ by at most 1."""
    # TFDS counts records within a split; here all splits share one list.
    return [
      [
        sources.FileSlice('', self._offsets[part.path] + part.skip, part.take)
        for part in shard
      ]
      for shard in super().shards(split, count)
    ]

  def check_files(self, split: str) -> None:
    """Do nothing: the files were listed when the folder was opened."""

  def read(self, file: sources.FileSlice) -> tf.data.Dataset:
    """Stream lines of a label and a path."""
    with tf.init_scope():  # Otherwise every graph holds a copy of the list.
      lines = tf.constant(self._lines)
    chosen = lines[file.skip : file.skip + file.take]
    return tf.data.Dataset.from_tensor_slices(chosen)

  def parse(self, record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Read the image of a line to (encoded image, int32 label)."""
    fields = tf.strings.split(record, '\t', maxsplit=1)
    image = formats.for_tensorflow(tf.io.read_file(fields[1]))
    return image, tf.strings.to_number(fields[0], tf.int32)

  def images(self, split: str) -> list[tuple[int, str]]:
    """Return the label and the path of each image of a split, in its order."""
    found = []
    for part in self.shards(split, 1)[0]:
      for line in self._lines[part.skip : part.skip + part.take]:
        label, _, path = line.decode().partition('\t')
        found.append((int(label), path))
    return found

  def key(self, record: bytes) -> str:
    """Return the path."""
    return record.decode().partition('\t')[2]


def _list(root: str) -> Listing:
  """List a folder in one pass."""
  listing = Listing()
  for folder, subfolders, files in tf.io.gfile.walk(root):
    parts = [part for part in folder[len(root) :].split('/') if part]
    files = [name for name in files if not name.startswith('.')]
    if any(part.startswith('.') for part in parts):
      continue
    if not files and not subfolders and len(parts) in (1, 2):
      listing.empty.append(folder)
    for name in files:
      _add(listing, parts, os.path.join(folder, name))
  return listing


def _add(listing: Listing, parts: Sequence[str], path: str) -> None:
  """Add a file in the subfolder `parts` to a listing."""
  is_image = images_lib.is_image(path)
  if is_image and len(parts) in (1, 2):
    split, class_name = ('train', *parts)[-2:]
    listing.images.append((split, class_name, path))
    return
  ending = os.path.splitext(path)[1].lower() or 'no ending'
  listing.left_out.setdefault(ELSEWHERE if is_image else ending, []).append(
    path
  )


def _hash(image: tuple[str, str, str]) -> bytes:
  split, class_name, path = image
  key = f'{split}/{class_name}/{os.path.basename(path)}'
  return hashlib.md5(key.encode(), usedforsecurity=False).digest()


def _splits(by_split: dict[str, list[bytes]]) -> tfds.core.SplitDict:
  """Return the splits for TFDS, which parses 'train[10%:]+validation'."""
  template = tfds.core.ShardedFileTemplate(
    data_dir='/', dataset_name='folder', filetype_suffix='list'
  )
  return tfds.core.SplitDict(
    [
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[len(lines)],
        num_bytes=0,
        filename_template=template,
      )
      for split, lines in by_split.items()
    ]
  )
