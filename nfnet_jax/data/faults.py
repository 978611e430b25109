"""Fault-tolerant streams: bad records are found, named, counted and skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import time
from typing import Any

import numpy as np
import tensorflow as tf

from nfnet_jax import errors
from nfnet_jax.data import records, sources
from nfnet_jax.storage import failures

Batch = dict[str, np.ndarray]
LogFn = Callable[[str], None]

# Good batches after which a stream stops skipping errors. Restarting it takes
# as long as filling its shuffle buffers.
_SKIPPING_BATCHES = 1000
# Errors of a file or its permissions, which do not go away on a retry.
PERMANENT = (
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
    what: the message without the advice.
  """

  def __init__(self, what: str, advice: str = ''):
    self.what = what
    super().__init__(what + advice)


class ReadError(OSError):
  """Files could not be read; trying again later may succeed."""


@dataclasses.dataclass
class BadRecords:
  """The bad records of a stream: names each once and limits their number.

  Attributes:
    source: dataset of the records.
    split: TFDS split that is read.
    slices: file slices that record ids refer to.
    max_count: number of bad records that are skipped.
    log_fn: logs a line for each.
    seen: ids of the bad records so far.
  """

  source: sources.Source
  split: str
  slices: Sequence[sources.FileSlice]
  max_count: int
  log_fn: LogFn
  seen: set[int] = dataclasses.field(default_factory=set)

  def check(self, ids: np.ndarray, usable: np.ndarray) -> None:
    """Check the records of a batch, and log new bad ones.

    Args:
      ids: ids of the records.
      usable: whether each can be used.

    Raises:
      BadDataError: naming the first bad record beyond `max_count`.
    """
    for record_id in ids[~usable].tolist():
      if record_id in self.seen:
        continue
      self.seen.add(record_id)
      line = self._describe(record_id)
      if len(self.seen) > self.max_count:
        raise BadDataError(
          f'{line}.',
          ' Repair the dataset, or skip such records with '
          f'--config.run.max_bad_records={len(self.seen)} or more.',
        )
      count = f'{len(self.seen)} of {self.max_count}'
      self.log_fn(f'Skipping a bad record: {line} ({count}).')

  def find_bad_file(self, error: Exception) -> BadDataError | ReadError:
    """Read all files again and return an error that names the one that fails.

    Args:
      error: the error of the stream; reported if no file fails now.
    """
    where = f"dataset '{self.source.name}', split '{self.split}'"
    for file in self.slices:
      read = 0
      try:
        for _ in self.source.read(file):
          read += 1
      except tf.errors.OpError as reason:
        kind = BadDataError if isinstance(reason, PERMANENT) else ReadError
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
      f'{where}: {errors.first_line(error)}; read again, all files are intact'
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


def fault_tolerant_batches(
  make_dataset: Callable[[int, bool], tf.data.Dataset],
  start: int,
  bad_records: BadRecords,
) -> Iterator[Batch]:
  """Iterate over batches; skip bad records and try again after outages.

  After an error that may be temporary, the stream waits and starts again at the
  same batch, a few times.

  An error in tf.data does not name its record. So that good data costs nothing
  extra, the stream skips no errors until one occurs; then it is restarted at
  the same batch in a slower form that marks records that fail. Good records
  yield the same examples. If this form finds no bad record for a long time, the
  stream returns to its fast form.

  Args:
    make_dataset: maps (start, skip_errors) to the batches from the start-th on.
      Each has `id` and `usable` of its records, which are removed here.
    start: the first batch.
    bad_records: checks the records of each batch.

  Yields:
    The batches.

  Raises:
    BadDataError: naming the record or file.
    ReadError: if the stream fails in spite of several tries or of skipping
      errors, and no file is bad.
  """
  skipping = 0  # Batches until the fast form.
  delays = iter(failures.DELAYS_S)
  batches = make_dataset(start, False).as_numpy_iterator()
  while True:
    try:
      batch = next(batches)
    except StopIteration:
      return
    except tf.errors.OpError as error:
      if not isinstance(error, PERMANENT):
        delay = next(delays, None)
        if delay is None:
          raise bad_records.find_bad_file(error) from error
        _wait(delay, error, bad_records.log_fn)
      elif skipping:
        raise bad_records.find_bad_file(error) from error
      else:
        skipping = _SKIPPING_BATCHES
      batches = make_dataset(start, bool(skipping)).as_numpy_iterator()
      continue
    delays = iter(failures.DELAYS_S)
    bad_records.check(batch.pop('id'), batch.pop('usable'))
    yield batch
    start += 1
    if skipping and not bad_records.seen:
      skipping -= 1
      if not skipping:
        batches = make_dataset(start, False).as_numpy_iterator()


def _wait(delay: float, error: Exception, log_fn: LogFn) -> None:
  reason = errors.first_line(error).removesuffix('.')
  log_fn(f'Reading data failed: {reason}. Trying again in {delay} s.')
  time.sleep(delay)


def with_fallback(function: Callable, fallback: Any) -> Callable:
  """Wrap a map of tensors to return `fallback` where it fails.

  It costs about a sixth of the time of decoding an image.
  """

  def map_or_fall_back(*tensors):
    result = tf.data.Dataset.from_tensors(tensors).map(function)
    result = result.ignore_errors(log_warning=False)
    otherwise = tf.data.Dataset.from_tensors(fallback)
    return result.concatenate(otherwise).take(1).get_single_element()

  return map_or_fall_back
