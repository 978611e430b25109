"""Image classification datasets in TFDS form, by name, as files and records."""

from collections.abc import Sequence
import contextlib
import dataclasses
import io
import sys

import tensorflow as tf
import tensorflow_datasets as tfds

# JAX owns the accelerators; TensorFlow would take all their memory.
for _kind in ('GPU', 'TPU'):
  tf.config.set_visible_devices([], _kind)

# Datasets of this project, built on first use without a download.
EMBEDDED = ('digits',)


class MissingDatasetError(ValueError):
  """The dataset or split is not there; the message says what to run."""


@dataclasses.dataclass(frozen=True)
class FileSlice:
  """`take` consecutive records of a TFRecord file, after the first `skip`."""

  path: str
  skip: int
  take: int


@dataclasses.dataclass(frozen=True)
class Source:
  """One prepared TFDS dataset.

  Attributes:
    name: as TFDS knows it.
    num_classes: number of labels.
  """

  name: str
  num_classes: int
  _builder: tfds.core.DatasetBuilder

  def num_examples(self, split: str) -> int:
    """Returns the size of a split such as 'train' or 'train[10000:]'."""
    return self._split_info(split).num_examples

  def shards(self, split: str, count: int) -> list[list[FileSlice]]:
    """Cuts a split into `count` fixed parts whose sizes differ by at most 1."""
    self._split_info(split)
    return [
      self._file_slices(part) for part in tfds.even_splits(split, n=count)
    ]

  def parse(self, record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Reads a serialised record as (encoded image, int32 label)."""
    example = self._builder.info.features.deserialize_example(
      record, decoders={'image': tfds.decode.SkipDecoding()}
    )
    return example['image'], tf.cast(example['label'], tf.int32)

  def _file_slices(self, split) -> list[FileSlice]:
    slices = []
    for file in self._builder.info.splits[split].file_instructions:
      # TFDS writes -1 for "the rest"; examples_in_shard counts the whole file.
      rest = file.examples_in_shard - file.skip
      take = rest if file.take == -1 else file.take
      slices.append(FileSlice(str(file.filename), file.skip, take))
    return slices

  def _split_info(self, split: str):
    try:
      return self._builder.info.splits[split]
    except (KeyError, ValueError, AssertionError) as error:
      known = ', '.join(self._builder.info.splits)
      raise MissingDatasetError(
        f"Dataset '{self.name}' has no split '{split}'; it has: {known}."
      ) from error


def load(name: str, data_dir: str | None = None) -> Source:
  """Opens a prepared TFDS image classification dataset.

  Args:
    name: a TFDS name such as 'imagenet2012', 'mnist:3.0.1' or 'digits'.
    data_dir: where TFDS keeps datasets; None for TFDS's own default.

  Raises:
    MissingDatasetError: if it is unknown or not prepared; the message says what
      to run.
    ValueError: if it is not one of images with labels, or is not stored as
      TFRecord.
  """
  if name in EMBEDDED:
    from nfnet_jax.data import digits  # noqa: F401  Registers the builder.
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except (tfds.core.registered.DatasetNotFoundError, AssertionError) as error:
    raise MissingDatasetError(
      f"TFDS knows no dataset '{name}', or not in that version; the embedded "
      f'ones are: {", ".join(EMBEDDED)}.'
    ) from error
  if not builder.info.splits:
    if name not in EMBEDDED:
      raise MissingDatasetError(_how_to_prepare(name, builder))
    tfds.disable_progress_bar()
    # TFDS prints; standard output belongs to the caller's result.
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare()
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
  return Source(name, features['label'].num_classes, builder)


def _how_to_prepare(name: str, builder: tfds.core.DatasetBuilder) -> str:
  # Not `tfds build`, which wants apache_beam.
  folder = str(builder.data_dir_root)
  call = f"tfds.builder('{name}', data_dir='{folder}').download_and_prepare()"
  return (
    f"Dataset '{name}' is not prepared under {folder}; run: {sys.executable} "
    f'-c "import tensorflow_datasets as tfds; {call}", or name another folder '
    'with --config.run.data_dir.'
  )


def total_examples(slices: Sequence[FileSlice]) -> int:
  """Counts the records of some file slices."""
  return sum(part.take for part in slices)
