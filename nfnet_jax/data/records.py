"""Raw records in an order that is a function of (seed, epoch, shard)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from nfnet_jax.data import sources

# Files that are interleaved, over all shards of a run.
_OPEN_FILES = 128
# Consecutive records of one file.
_BLOCK = 16

# A record's id holds the number of its slice and its place in the slice's file.
_ID_BITS = 32


def shard_stream(
  source: sources.Source,
  slices: Sequence[sources.FileSlice],
  *,
  first_slice: int,
  seed: int,
  shard: int,
  shards: int,
  buffer: int,
  start: int,
) -> tf.data.Dataset:
  """Stream a shard's records epoch by epoch, without end.

  Args:
    source: dataset of the slices.
    slices: the shard's part of the data.
    first_slice: number of its first slice, for the records' ids.
    seed: root of the order.
    shard: index of the shard.
    shards: number of shards.
    buffer: size of the shuffle buffer in records; a larger shard is shuffled
      approximately.
    start: records to skip. At most one epoch of them is read, none is decoded.

  Returns:
    A dataset of (id, record).
  """
  size = sources.total_examples(slices)
  first_epoch, offset = divmod(start, size)
  # Depends only on the run's settings, because it decides the order.
  open_files = max(1, min(16, _OPEN_FILES // shards))

  def epoch(index: tf.Tensor) -> tf.data.Dataset:
    # `shuffle` would mix the program's global seed with these; this unsets it
    # in this graph only.
    tf.compat.v1.set_random_seed(None)
    seeds = tf.random.stateless_uniform(
      [2],
      (seed, index * shards + shard),
      minval=None,
      maxval=None,
      dtype=tf.int64,
    )
    files = _files(slices, first_slice).shuffle(
      len(slices), seeds[0], reshuffle_each_iteration=False
    )
    shuffled = (
      _read(source, files, open_files)
      .apply(tf.data.experimental.assert_cardinality(size))
      .shuffle(min(size, buffer), seeds[1], reshuffle_each_iteration=False)
    )
    return shuffled.skip(tf.where(index == first_epoch, np.int64(offset), 0))

  epochs = tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max)
  return epochs.flat_map(epoch)


def in_order(
  source: sources.Source, slices: Sequence[sources.FileSlice]
) -> tf.data.Dataset:
  """Stream (id, record) of some slices once, in a fixed order."""
  records = _read(source, _files(slices, 0), open_files=16)
  size = sources.total_examples(slices)
  return records.apply(tf.data.experimental.assert_cardinality(size))


def locate(
  slices: Sequence[sources.FileSlice], record_id: int
) -> sources.FileSlice:
  """Return the slice that holds only the record of an id."""
  number, place = divmod(int(record_id), 1 << _ID_BITS)
  return sources.FileSlice(slices[number].path, place, 1)


def _files(slices: Sequence[sources.FileSlice], first: int) -> tf.data.Dataset:
  return tf.data.Dataset.from_tensor_slices(
    (
      np.arange(first, first + len(slices), dtype=np.int64),
      tf.constant([part.path for part in slices], tf.string),  # Or none.
      np.asarray([part.skip for part in slices], np.int64),
      np.asarray([part.take for part in slices], np.int64),
    )
  )


def _read(
  source: sources.Source, files: tf.data.Dataset, open_files: int
) -> tf.data.Dataset:
  def read(number, path, skip, take):
    first = number * (1 << _ID_BITS) + skip
    records = source.read(sources.FileSlice(path, skip, take))
    return tf.data.Dataset.zip(
      tf.data.Dataset.range(first, first + take), records
    )

  return files.interleave(
    read,
    cycle_length=open_files,
    block_length=_BLOCK,
    num_parallel_calls=open_files,
    deterministic=True,
  )
