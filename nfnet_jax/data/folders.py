"""A folder of images by class, as a dataset."""

from __future__ import annotations

from collections.abc import Iterator
import hashlib
import os

import tensorflow as tf
import tensorflow_datasets as tfds

from nfnet_jax.data import sources

_ENDINGS = ('.jpg', '.jpeg', '.png', '.gif', '.bmp')


class FolderSource(sources.Source):
  """Images in `ROOT/SPLIT/CLASS/`, or in `ROOT/CLASS/` as the split 'train'.

  The classes are the folders of all splits, sorted by name. The images of a
  split are sorted by a hash of their paths, so that a slice such as
  'train[:10%]' holds all classes.
  """

  def __init__(self, root: str):
    """List the folder, which may be in a bucket.

    Raises:
      sources.MissingDatasetError: if it holds no images by class.
    """
    root = root.rstrip('/')
    images = list(_list_images(root))
    if not images:
      raise sources.MissingDatasetError(
        f"'{root}' holds no images. Put them into SPLIT/CLASS/ or CLASS/, with "
        f'one of the endings {", ".join(_ENDINGS)}.'
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
    return tf.io.read_file(fields[1]), tf.strings.to_number(fields[0], tf.int32)

  def key(self, record: bytes) -> str:
    """Return the path."""
    return record.decode().partition('\t')[2]


def _list_images(root: str) -> Iterator[tuple[str, str, str]]:
  """Yield (split, class, path) of every image under a folder."""
  for folder, _, files in tf.io.gfile.walk(root):
    parts = folder[len(root) :].strip('/').split('/')
    if len(parts) == 1 and parts[0]:
      parts = ['train', *parts]
    if len(parts) != 2:
      continue
    for name in files:
      if name.lower().endswith(_ENDINGS):
        yield *parts, os.path.join(folder, name)


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
