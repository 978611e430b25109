"""Batches for training and evaluation, the same for any number of processes.

A run has a fixed number of data shards. Shard s reads its own slice of the
data, in an order that is a function of (seed, epoch, s), and fills its own part
of every global batch; augmentation is a function of (seed, step, position), and
mixing stays within a shard's part. So batches depend neither on the number of
processes and devices nor on the step at which a run is resumed.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import functools
import os

import numpy as np
import tensorflow as tf

from nfnet_jax import preprocessing as preprocessing_lib
from nfnet_jax.data import examples, faults, preprocess, records, sources

# Groups of records that a host decodes and augments in parallel.
CALLS = os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class TrainSpec:
  """A stream of training batches.

  Attributes:
    source: dataset of the records.
    split: TFDS split.
    batch_size: size of the global batch, a multiple of `shards` times
      `augmentation.examples_per_group`.
    image_size: height and width of the images in pixels.
    shards: data shards of the run, a multiple of the number of processes.
    seed: root of the order and of the augmentation.
    augmentation: see `preprocessing.Augmentation`.
    block: height and width in pixels of the blocks of space-to-depth, which
      divide the image; a block becomes one pixel of `3 * block^2` channels. 1
      for plain images.
    shuffle_buffer: size of the shuffle buffers of all shards together, in
      records; a shard with more records than its buffer is shuffled
      approximately.
    max_bad_records: number of unusable records that a process skips.
  """

  source: sources.Source
  split: str
  batch_size: int
  image_size: int
  shards: int
  seed: int
  augmentation: preprocessing_lib.Augmentation
  block: int = 1
  shuffle_buffer: int = 65_536
  max_bad_records: int = 0

  @property
  def per_shard(self) -> int:
    """Examples per shard and batch."""
    return self.batch_size // self.shards


def train_batches(
  spec: TrainSpec,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  log_fn: faults.LogFn = lambda line: None,
) -> Iterator[faults.Batch]:
  """Stream this process's part of the global batches, without end.

  Args:
    spec: the stream.
    start_step: the first step to deliver. At most one epoch of raw records is
      skipped for it, without decoding them.
    process_index: index of this process.
    process_count: number of processes; divides `spec.shards`.
    log_fn: logs a line for each bad record that is skipped.

  Yields:
    `image [n, S, S, 3]` in pixel units, uint8 after RandAugment or AutoAugment
    and float32 without them, or in blocks `[n, S / block, S / block, 3
    block^2]`; `label [n, K]` int32 and `weight [n, K]` float32, whose rows sum
    to 1 (to 0 where no record was usable), with K = 2 for mixed images and K =
    1 otherwise; `position [n]` int32 in the global batch; the scalar `step`.

  Raises:
    faults.BadDataError: naming the record or file that cannot be used.
    faults.ReadError: if files could not be read but are not bad.
  """
  per_process = spec.shards // process_count
  shards = range(process_index * per_process, (process_index + 1) * per_process)
  slices_of_all = spec.source.shards(spec.split, spec.shards)
  shard_slices = [slices_of_all[shard] for shard in shards]
  groups = per_process * spec.per_shard // spec.augmentation.examples_per_group
  transform = examples.TrainTransform(
    spec.source,
    spec.augmentation,
    image_size=spec.image_size,
    seed=spec.seed,
    per_shard=spec.per_shard,
    groups=groups,
    first_position=shards.start * spec.per_shard,
    block=spec.block,
  )

  def make_dataset(step: int, skip_errors: bool) -> tf.data.Dataset:
    return (
      _raw_records(spec, shards, shard_slices, step)
      .batch(spec.augmentation.records_per_group, drop_remainder=True)
      .enumerate(step * groups)
      .map(functools.partial(transform, skip_errors=skip_errors), CALLS)
      .batch(groups, drop_remainder=True)
      .map(functools.partial(_merge_groups, shards=len(shards)))
      .prefetch(2)
      .with_options(_options())
    )

  slices = [file for part in shard_slices for file in part]
  bad_records = faults.BadRecords(
    spec.source, spec.split, slices, spec.max_bad_records, log_fn
  )
  batches = faults.fault_tolerant_batches(make_dataset, start_step, bad_records)
  for step, batch in enumerate(batches, start=start_step):
    yield {**batch, 'step': np.asarray(step, np.int32)}


def _raw_records(
  spec: TrainSpec,
  shards: range,
  shard_slices: list[list[sources.FileSlice]],
  step: int,
) -> tf.data.Dataset:
  """Stream (id, record); a shard's records of a batch follow one another."""
  augmentation = spec.augmentation
  groups = spec.per_shard // augmentation.examples_per_group
  count = groups * augmentation.records_per_group
  streams, first_slice = [], 0
  for shard, slices in zip(shards, shard_slices):
    streams.append(
      records.shard_stream(
        spec.source,
        slices,
        first_slice=first_slice,
        seed=spec.seed,
        shard=shard,
        shards=spec.shards,
        buffer=max(1, spec.shuffle_buffer // spec.shards),
        start=step * count,
      )
    )
    first_slice += len(slices)
  turns = tf.data.Dataset.range(len(shards) * count)
  return tf.data.Dataset.choose_from_datasets(
    streams, turns.map(lambda i: i // count).repeat(), False
  )


def _merge_groups(
  batch: dict[str, tf.Tensor], shards: int
) -> dict[str, tf.Tensor]:
  """Merge groups to a batch, of which each shard has a part.

  Args:
    batch: `[groups, copies, examples, ...]`, but `[groups, records]` for the
      ids of records and whether they are usable.
    shards: number of shards whose groups these are, one shard after another.

  Returns:
    `[shards x copies x groups of a shard x examples, ...]`, and `[groups x
    records]`.
  """
  merged = {}
  for name, value in batch.items():
    if name in ('id', 'usable'):
      merged[name] = tf.reshape(value, [-1])
      continue
    copies, *rest = value.shape[1:]
    if copies > 1:
      value = tf.reshape(value, [shards, -1, copies, *rest])
      others = range(3, 3 + len(rest))
      value = tf.transpose(value, [0, 2, 1, *others])
    merged[name] = tf.reshape(value, [-1, *rest[1:]])
  return merged


def eval_batches(
  source: sources.Source,
  split: str,
  *,
  batch_size: int,
  preprocessing: preprocessing_lib.EvalPreprocessing,
  process_index: int = 0,
  process_count: int = 1,
  max_bad_records: int = 0,
  log_fn: faults.LogFn = lambda line: None,
) -> Iterator[faults.Batch]:
  """Stream every example of a split exactly once over all processes.

  Args:
    source: dataset of the records.
    split: TFDS split.
    batch_size: size of the global batch, a multiple of `process_count`.
    preprocessing: preprocessing of each image.
    process_index: index of this process.
    process_count: number of processes.
    max_bad_records: number of unusable records that a process skips.
    log_fn: logs a line for each bad record that is skipped.

  Yields:
    `image [n, S, S, 3]` float32 in pixel units, `label [n]` int32 and
    `mask [n]` float32, which is 0 where the batch was padded or a record
    unusable. All processes get the same number of batches, as collectives need.

  Raises:
    faults.BadDataError: naming the record or file that cannot be used.
    faults.ReadError: if files could not be read but are not bad.
  """
  parts = source.shards(split, process_count)
  slices = parts[process_index]
  local_size = batch_size // process_count
  num_batches = -(-max(map(sources.total_examples, parts)) // local_size)

  def decode(record: tf.Tensor) -> examples.Decoded:
    encoded, label = source.parse(record)
    image = preprocess.decode_and_crop(encoded, preprocessing)
    return examples.Decoded(image, label, examples.is_in_range(label, source))

  def example(record_id: tf.Tensor, decoded: examples.Decoded):
    return {
      'image': decoded.image,
      'label': decoded.label,
      'mask': tf.cast(decoded.is_usable, tf.float32),
      'id': record_id,
      'usable': decoded.is_usable,
    }

  unusable = examples.unusable(preprocessing.size)
  padding = {**example(tf.constant(-1, tf.int64), unusable), 'usable': True}

  def make_dataset(start: int, skip_errors: bool) -> tf.data.Dataset:
    decode_fn = (
      faults.with_fallback(decode, unusable) if skip_errors else decode
    )
    return (
      records.in_order(source, slices)
      .skip(start * local_size)
      .map(lambda i, record: example(i, decode_fn(record)), CALLS)
      .concatenate(tf.data.Dataset.from_tensors(padding).repeat())
      .batch(local_size)
      .take(num_batches - start)
      .prefetch(2)
      .with_options(_options())
    )

  bad_records = faults.BadRecords(
    source, split, slices, max_bad_records, log_fn
  )
  yield from faults.fault_tolerant_batches(make_dataset, 0, bad_records)


def _options() -> tf.data.Options:
  options = tf.data.Options()
  options.deterministic = True
  # The autotuner's thread may sleep for a minute before a pipeline can end.
  options.autotune.enabled = False
  return options
