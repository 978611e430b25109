"""Records that cannot be used: found, named, counted."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses

import numpy as np
import tensorflow as tf

from nfnet_jax import errors
from nfnet_jax.data import records, sources

Batch = dict[str, np.ndarray]

# Batches without a fault after which a stream is fast again. To make it anew
# takes as long as to fill its shuffle buffers.
_CAREFUL_BATCHES = 1000
# What is wrong with a file itself, or with who reads it.
_LASTING = (
  tf.errors.DataLossError,
  tf.errors.FailedPreconditionError,
  tf.errors.InvalidArgumentError,
  tf.errors.NotFoundError,
  tf.errors.PermissionDeniedError,
  tf.errors.UnauthenticatedError,
  tf.errors.UnimplementedError,
)


class BadDataError(ValueError):
  """A record or file cannot be used; the message names it.

  Attributes:
    what: is wrong with which, without the way out.
  """

  def __init__(self, what: str, way_out: str = ''):
    self.what = what
    super().__init__(what + way_out)


class ReadError(OSError):
  """Files could not be read, but perhaps can be at another time."""


@dataclasses.dataclass
class BadRecords:
  """Names bad records, and bounds how many different ones are passed over.

  Attributes:
    source: the dataset.
    split: what is read of it.
    slices: the slices that records' ids count.
    allowed: how many bad records are passed over.
    note: shows a line to the person.
    seen: ids of those passed over.
  """

  source: sources.Source
  split: str
  slices: Sequence[sources.FileSlice]
  allowed: int
  log_fn: Callable[[str], None]
  seen: set[int] = dataclasses.field(default_factory=set)

  def check(self, ids: np.ndarray, usable: np.ndarray) -> None:
    """Looks for bad records in a batch.

    Args:
      ids: of its records.
      usable: whether each is.

    Raises:
      BadDataError: naming the first that is one too many.
    """
    for record_id in ids[~usable].tolist():
      if record_id in self.seen:
        continue
      self.seen.add(record_id)
      line = self._describe(record_id)
      if len(self.seen) > self.allowed:
        raise BadDataError(
          f'{line}.',
          ' Repair the dataset, or let some such records be passed over: '
          f'--config.run.max_bad_records={len(self.seen)} or more.',
        )
      self.log_fn(f'Passing over {line} ({len(self.seen)} of {self.allowed}).')

  def find_bad_file(self, error: Exception) -> BadDataError | ReadError:
    """Reads all files again to say which of them failed, or that none does."""
    where = f"dataset '{self.source.name}', split '{self.split}'"
    for file in self.slices:
      read = 0
      try:
        for _ in self.source.read(file):
          read += 1
      except tf.errors.OpError as reason:
        kind = BadDataError if isinstance(reason, _LASTING) else ReadError
        return kind(
          f'{where}: after record {file.skip + read} of {file.path}: '
          f'{errors.first_line(reason)}'
        )
      if read < file.take:
        return BadDataError(
          f'{where}: {file.path} ends after {file.skip + read} records; '
          f'there should be {file.skip + file.take}. Copy it again.'
        )
    return ReadError(
      f'{where}: {errors.first_line(error)}; read again, all files are well'
    )

  def _describe(self, record_id: int) -> str:
    file = records.locate(self.slices, record_id)
    (record,) = self.source.read(file)
    key = self.source.key(record.numpy())
    place = f'record {file.skip} of {file.path}' if file.path else ''
    return (
      f"dataset '{self.source.name}', split '{self.split}', "
      f'example {", ".join(filter(None, [key, place]))}: '
      f'{self._fault(record)}'
    )

  def _fault(self, record: tf.Tensor) -> str:
    try:
      _, label = self.source.parse(record)
    except tf.errors.OpError as error:
      return errors.first_line(error)
    if not 0 <= label < self.source.num_classes:
      return f'label {label} is not in [0, {self.source.num_classes})'
    return 'the image cannot be decoded'


def guarded(
  make: Callable[..., tf.data.Dataset], start: int, bad: BadRecords
) -> Iterator[Batch]:
  """Iterates over batches and deals with bad data.

  A failure inside tf.data does not say whose it was. So that good data pays
  nothing, the stream is made anew in its careful form when one happens, from
  the same batch on; good records come out the same. It becomes fast again if
  long no record is found to be bad: then a file was, for a moment.

  Args:
    make: `(start, careful) -> batches from the start-th on`, each with `id`
      and `usable` of its records, which are taken out here. A careful stream
      marks records that fail and goes on.
    start: the first batch.
    bad: the judge.

  Raises:
    BadDataError: naming the record or file.
    ReadError: if a careful stream fails, yet no file is bad.
  """
  careful = 0  # Batches to come in the careful form.
  batches = make(start, False).as_numpy_iterator()
  while True:
    try:
      batch = next(batches)
    except StopIteration:
      return
    except tf.errors.OpError as error:
      if careful:
        raise bad.find_bad_file(error) from error
      careful = _CAREFUL_BATCHES
      batches = make(start, True).as_numpy_iterator()
      continue
    bad.check(batch.pop('id'), batch.pop('usable'))
    yield batch
    start += 1
    if careful and not bad.seen:
      careful -= 1
      if not careful:
        batches = make(start, False).as_numpy_iterator()


def carefully(function: Callable, failed):
  """Wraps a map of tensors so that a failure in it becomes the value `failed`.

  Costs a sixth of decoding an image.
  """

  def careful(*tensors):
    attempt = tf.data.Dataset.from_tensors(tensors).map(function)
    attempt = attempt.ignore_errors(log_warning=False)
    otherwise = tf.data.Dataset.from_tensors(failed)
    return attempt.concatenate(otherwise).take(1).get_single_element()

  return careful
