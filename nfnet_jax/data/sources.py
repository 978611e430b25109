"""Image classification datasets by name: their splits, files and records."""

import abc
from collections.abc import Sequence
import contextlib
import dataclasses
import io
import os

import tensorflow as tf
import tensorflow_datasets as tfds

# JAX owns the accelerators; TensorFlow would take all their memory.
for _kind in ('GPU', 'TPU'):
  tf.config.set_visible_devices([], _kind)

# Datasets of this project, built on first use without a download.
EMBEDDED = ('digits',)


class MissingDatasetError(ValueError):
  """A dataset, split or file is not there; the message says what to do."""


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
    class_names: what the labels 0, 1, ... stand for.
  """

  def __init__(
    self, name: str, class_names: Sequence[str], splits: tfds.core.SplitDict
  ):
    self.name = name
    self.class_names = tuple(class_names)
    self._splits = splits

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  @property
  def splits(self) -> list[str]:
    return list(self._splits)

  def num_examples(self, split: str) -> int:
    """Returns the size of a split such as 'train' or 'train[10000:]'.

    Raises:
      MissingDatasetError: if there is no such split.
    """
    return self._split_info(split).num_examples

  def shards(self, split: str, count: int) -> list[list[FileSlice]]:
    """Cuts a split into `count` fixed parts whose sizes differ by at most 1."""
    self._split_info(split)
    return [
      self._file_slices(part) for part in tfds.even_splits(split, n=count)
    ]

  @abc.abstractmethod
  def check_files(self, split: str) -> None:
    """Checks that every file of a split is there.

    Raises:
      MissingDatasetError: naming one that is not.
    """

  @abc.abstractmethod
  def read(self, file: FileSlice) -> tf.data.Dataset:
    """Streams the raw records of a slice whose fields are tensors."""

  @abc.abstractmethod
  def parse(self, record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Reads a raw record as (encoded image, int32 label)."""

  @abc.abstractmethod
  def key(self, record: bytes) -> str:
    """Returns what a person finds a record by, or ''."""

  def _split_info(self, split: str):
    try:
      return self._splits[split]
    except (KeyError, ValueError, AssertionError) as error:
      known = ', '.join(self._splits)
      raise MissingDatasetError(
        f"Dataset '{self.name}' has no split '{split}'; it has: {known}."
      ) from error

  def _file_slices(self, split) -> list[FileSlice]:
    slices = []
    for file in self._split_info(split).file_instructions:
      # TFDS writes -1 for "the rest"; examples_in_shard counts the whole file.
      rest = file.examples_in_shard - file.skip
      take = rest if file.take == -1 else file.take
      slices.append(FileSlice(str(file.filename), file.skip, take))
    return slices


class TFDSSource(Source):
  """A prepared TFDS dataset in TFRecord files, on a disk or in a bucket.

  Attributes:
    data_dir_root: where TFDS keeps this and other datasets.
  """

  def __init__(self, name: str, builder: tfds.core.DatasetBuilder):
    info = builder.info
    super().__init__(name, info.features['label'].names, info.splits)
    self._features = info.features
    self.data_dir_root = str(builder.data_dir_root)

  def check_files(self, split: str) -> None:
    for file in self._file_slices(split):
      folder, base = os.path.split(file.path)
      if base not in _listing(folder):
        raise MissingDatasetError(
          f"Dataset '{self.name}' lacks the file {base} of its split "
          f"'{split}' in {folder}; copy it there or prepare the dataset again."
        )

  def read(self, file: FileSlice) -> tf.data.Dataset:
    return tf.data.TFRecordDataset(file.path).skip(file.skip).take(file.take)

  def parse(self, record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    example = self._features.deserialize_example(
      record, decoders={'image': tfds.decode.SkipDecoding()}
    )
    return example['image'], tf.cast(example['label'], tf.int32)

  def key(self, record: bytes) -> str:
    fields = tf.train.Example.FromString(record).features.feature
    names = fields['file_name'].bytes_list.value
    return names[0].decode() if names else ''


_listings: dict[str, frozenset[str]] = {}


def _listing(folder: str) -> frozenset[str]:
  """Lists a folder once: a thousand files in a bucket are one request."""
  if folder not in _listings:
    _listings[folder] = frozenset(tf.io.gfile.listdir(folder))
  return _listings[folder]


def load(name: str, data_dir: str | None = None) -> Source:
  """Opens a dataset.

  Args:
    name: a TFDS name such as 'imagenet2012', 'mnist:3.0.1' or 'digits'; or the
      path of a folder of images by class, see `data.folders`.
    data_dir: where TFDS keeps datasets; None for TFDS's own default.

  Raises:
    MissingDatasetError: if it is unknown or not prepared; the message says what
      to run.
    ValueError: if it is not one of images with labels, or is not stored as
      TFRecord.
  """
  _listings.clear()
  if '/' in name and tf.io.gfile.isdir(name):
    from nfnet_jax.data import folders

    return folders.FolderSource(name)
  if name in EMBEDDED:
    from nfnet_jax.data import digits  # noqa: F401  Registers the builder.
  builder = get_builder(name, data_dir)
  if not builder.info.splits:
    if name not in EMBEDDED:
      raise MissingDatasetError(
        f"Dataset '{name}' is not prepared under {builder.data_dir_root}; run: "
        f'python -m nfnet_jax.experiments.prepare {name} '
        f'--data_dir={builder.data_dir_root}; or name another folder with '
        '--config.run.data_dir.'
      )
    tfds.disable_progress_bar()
    # TFDS prints; standard output belongs to the caller's result.
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare()
  _check_kind(name, builder)
  return TFDSSource(name, builder)


def get_builder(
  name: str, data_dir: str | None = None
) -> tfds.core.DatasetBuilder:
  """Finds the builder of a TFDS dataset, prepared or not.

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
      f'no such folder; the embedded ones are: {", ".join(EMBEDDED)}.'
    ) from error


def _check_kind(name: str, builder: tfds.core.DatasetBuilder) -> None:
  features = builder.info.features
  for key, kind in (
    ('image', tfds.features.Image),
    ('label', tfds.features.ClassLabel),
  ):
    if key not in features or not isinstance(features[key], kind):
      raise ValueError(
        f"Dataset '{name}' is not one of image classification: it has no "
        f"{kind.__name__} feature '{key}', only: {', '.join(features)}."
      )
  file_format = builder.info.file_format.value
  if file_format != 'tfrecord':
    raise ValueError(
      f"Dataset '{name}' is stored as {file_format}; prepare it as tfrecord."
    )


def total_examples(slices: Sequence[FileSlice]) -> int:
  """Counts the records of some file slices."""
  return sum(part.take for part in slices)
