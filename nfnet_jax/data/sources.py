"""Image classification datasets by name: their splits, files and records."""

from __future__ import annotations

import abc
from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import io
import os

import tensorflow as tf
import tensorflow_datasets as tfds

from nfnet_jax.data import devices, known
from nfnet_jax.storage import failures

# Datasets of this project, built on first use without a download.
EMBEDDED = [name for name, each in known.DATASETS.items() if each.embedded]


class MissingDatasetError(ValueError):
  """A dataset, split or file is missing; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class FileSlice:
  """`take` consecutive records of a file, after the first `skip`."""

  path: str
  skip: int
  take: int


class Source(abc.ABC):
  """A dataset that is ready to be read.

  Attributes:
    name: as the caller gave it.
    class_names: names of the labels 0, 1, ...
  """

  def __init__(
    self, name: str, class_names: Sequence[str], splits: tfds.core.SplitDict
  ):
    self.name = name
    self.class_names = tuple(class_names)
    self._splits = splits

  @property
  def num_classes(self) -> int:
    """Number of classes."""
    return len(self.class_names)

  @property
  def splits(self) -> list[str]:
    """Names of the splits."""
    return list(self._splits)

  def num_examples(self, split: str) -> int:
    """Return the size of a split such as 'train' or 'train[10000:]'.

    Raises:
      MissingDatasetError: if there is no such split.
    """
    return self._split_info(split).num_examples

  def shards(self, split: str, count: int) -> list[list[FileSlice]]:
    """Cut a split into `count` fixed parts whose sizes differ by at most 1."""
    self._split_info(split)
    return [
      self._file_slices(part) for part in tfds.even_splits(split, n=count)
    ]

  @abc.abstractmethod
  def check_files(self, split: str) -> None:
    """Check that no file of a split is missing.

    Raises:
      MissingDatasetError: naming a missing file.
    """

  @abc.abstractmethod
  def read(self, file: FileSlice) -> tf.data.Dataset:
    """Stream the raw records of a slice, whose fields may be tensors."""

  @abc.abstractmethod
  def parse(self, record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Parse a raw record to (encoded image, int32 label)."""

  @abc.abstractmethod
  def key(self, record: bytes) -> str:
    """Return the file name or path of a record's image, '' if unknown."""

  def _split_info(
    self, split: str | tfds.core.ReadInstruction
  ) -> tfds.core.SplitInfo:
    try:
      return self._splits[split]
    except (KeyError, ValueError, AssertionError) as error:
      known = ', '.join(self._splits)
      hint = (
        " A slice ends within its split, as in 'train[:100]' or 'train[90%:]'."
        if '[' in str(split)
        else ''
      )
      raise MissingDatasetError(
        f"Dataset '{self.name}' has no split '{split}'; it has: {known}.{hint}"
      ) from error

  def _file_slices(
    self, split: str | tfds.core.ReadInstruction
  ) -> list[FileSlice]:
    slices = []
    for file in self._split_info(split).file_instructions:
      # TFDS writes -1 for "the rest"; examples_in_shard counts the whole file.
      rest = file.examples_in_shard - file.skip
      take = rest if file.take == -1 else file.take
      slices.append(FileSlice(str(file.filename), file.skip, take))
    return slices


class TFDSSource(Source):
  """A prepared TFDS dataset in TFRecord files, local or in a bucket.

  Attributes:
    data_dir_root: folder of this and other TFDS datasets.
  """

  def __init__(self, name: str, builder: tfds.core.DatasetBuilder):
    info = builder.info
    super().__init__(name, info.features['label'].names, info.splits)
    self._features = info.features
    self.data_dir_root = str(builder.data_dir_root)

  def check_files(self, split: str) -> None:
    """Check that no file of a split is missing."""
    for file in self._file_slices(split):
      folder, base = os.path.split(file.path)
      if base not in _listing(folder):
        raise MissingDatasetError(
          f"Dataset '{self.name}' lacks the file {base} of its split "
          f"'{split}' in {folder}. Copy it there or prepare the dataset again."
        )

  def read(self, file: FileSlice) -> tf.data.Dataset:
    """Stream serialized `tf.train.Example`s."""
    return tf.data.TFRecordDataset(file.path).skip(file.skip).take(file.take)

  def parse(self, record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Parse a serialized example to (encoded image, int32 label)."""
    example = self._features.deserialize_example(
      record, decoders={'image': tfds.decode.SkipDecoding()}
    )
    return example['image'], tf.cast(example['label'], tf.int32)

  def key(self, record: bytes) -> str:
    """Return the feature `file_name`, '' if there is none."""
    fields = tf.train.Example.FromString(record).features.feature
    names = fields['file_name'].bytes_list.value
    return names[0].decode() if names else ''


@functools.cache
def _listing(folder: str) -> frozenset[str]:
  """List a folder once: a thousand files in a bucket are one request."""
  names = failures.read(
    f'Listing {folder}',
    lambda: tf.io.gfile.listdir(folder),
    tf.errors.OpError,
  )
  return frozenset(names)


def load(name: str, data_dir: str | None = None) -> Source:
  """Open a dataset, and hide accelerators from TensorFlow.

  Args:
    name: a TFDS name such as 'imagenet2012', 'mnist:3.0.1' or 'digits'; or the
      path of a folder of images by class, see `data.folders`. A path without a
      '/' that is also a TFDS name stands for the TFDS dataset.
    data_dir: folder of TFDS datasets; None for TFDS's default.

  Raises:
    MissingDatasetError: if it is unknown or not prepared; the message says what
      to run.
    ValueError: if it does not consist of images with labels, or is not stored
      as TFRecord.
    OSError: if it cannot be read, in spite of several tries after an outage.
    RuntimeError: if TensorFlow uses an accelerator already.
  """
  devices.hide_accelerators()
  _listing.cache_clear()
  open_source = functools.partial(_open, name, data_dir)
  return failures.read(f"Opening '{name}'", open_source, tf.errors.OpError)


def _open(name: str, data_dir: str | None) -> Source:
  if _is_folder(name):
    from nfnet_jax.data import folders  # Imports this module.

    return folders.FolderSource(name)
  if name in EMBEDDED:
    from nfnet_jax.data import digits  # noqa: F401  Registers the builder.
  builder = get_builder(name, data_dir)
  if not builder.info.splits:
    if name not in EMBEDDED:
      root = str(builder.data_dir_root)
      raise MissingDatasetError(known.how_to_prepare(name, root))
    tfds.disable_progress_bar()
    # TFDS prints, but standard output is for the caller's results.
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare()
  _check_kind(name, builder)
  return TFDSSource(name, builder)


def _is_folder(name: str) -> bool:
  """Return whether a dataset is a folder of images, not one of TFDS."""
  if not tf.io.gfile.isdir(name):
    return False
  return '/' in name or name not in _tfds_names()


def _tfds_names() -> set[str]:
  return {*EMBEDDED, *tfds.list_builders(with_community_datasets=False)}


def get_builder(
  name: str, data_dir: str | None = None
) -> tfds.core.DatasetBuilder:
  """Return the builder of a TFDS dataset, prepared or not.

  Raises:
    MissingDatasetError: if TFDS does not know it.
  """
  try:
    return tfds.builder(name, data_dir=data_dir)
  except (
    tfds.core.registered.DatasetNotFoundError,
    AssertionError,
    ValueError,
  ) as error:
    raise MissingDatasetError(
      f"TFDS knows no dataset '{name}', or not in that version, and there is "
      'no such folder. Give the name of a TFDS dataset, the path of a folder '
      f'of images, or one of: {", ".join(EMBEDDED)}.'
    ) from error


def _check_kind(name: str, builder: tfds.core.DatasetBuilder) -> None:
  features = builder.info.features
  for key, kind in (
    ('image', tfds.features.Image),
    ('label', tfds.features.ClassLabel),
  ):
    if key not in features or not isinstance(features[key], kind):
      raise ValueError(
        f"Dataset '{name}' is not for image classification: it has no "
        f"{kind.__name__} feature '{key}', only: {', '.join(features)}."
      )
  file_format = builder.info.file_format.value
  if file_format != 'tfrecord':
    raise ValueError(
      f"Dataset '{name}' is stored as {file_format}. Prepare it as tfrecord."
    )


def count_common(source: Source, split: str, other: str) -> int:
  """Return how many examples two splits have in common."""
  (slices,), (others,) = source.shards(split, 1), source.shards(other, 1)
  return sum(
    max(0, min(a.skip + a.take, b.skip + b.take) - max(a.skip, b.skip))
    for a in slices
    for b in others
    if a.path == b.path
  )


def total_examples(slices: Sequence[FileSlice]) -> int:
  """Return the number of records in file slices."""
  return sum(part.take for part in slices)
