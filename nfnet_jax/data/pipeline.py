"""Batches for training and evaluation, the same for any number of processes.

A run has a fixed number of data shards. Shard s reads its own slice of the
data, in an order that is a function of (seed, epoch, s), and fills its own part
of every global batch; augmentation is a function of (seed, step, position), and
mixing stays within a shard's part. So batches depend neither on processes and
devices nor on where a run was resumed.
"""

from collections.abc import Callable, Iterator
import dataclasses
import os

import numpy as np
import tensorflow as tf

from nfnet_jax import preprocessing as preprocessing_lib
from nfnet_jax.data import examples, faults, preprocess, records, sources

Batch = dict[str, np.ndarray]
LogFn = Callable[[str], None]

# Images, or groups of mixed ones, that a host makes at once.
CALLS = os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class TrainSpec:
  """A training stream.

  Attributes:
    source: where records come from.
    split: TFDS split.
    batch_size: examples of the global batch, a multiple of `shards`; with
      partners in the batch, of twice as many.
    image_size: pixels a side.
    shards: data shards of the run, a multiple of the number of processes.
    seed: root of order and augmentation.
    augmentation: see `preprocessing.Augmentation`.
    block: pixels a side of the blocks that images are cut into, which divide
      them; a block's pixels lie side by side on the last axis. 1 for whole
      images.
    shuffle_buffer: records of all shards together that are held to be shuffled;
      fewer than there are shuffle approximately.
    max_bad_records: how many unusable records a process passes over.
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
    """Examples of a shard in every batch."""
    return self.batch_size // self.shards


def train_batches(
  spec: TrainSpec,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  log_fn: LogFn = lambda line: None,
) -> Iterator[Batch]:
  """Streams this process's part of the global batches, without end.

  Args:
    spec: the stream.
    start_step: the first batch to deliver. At most an epoch's raw records are
      skipped to get there, undecoded.
    process_index: which part.
    process_count: of how many; divides `spec.shards`.
    note: shows a line to the person.

  Yields:
    `image [n, S, S, 3]` in pixel units, uint8 after RandAugment and float32
    without it, or in blocks `[n, S / block, S / block, 3 block^2]`; `label [n,
    K]` int32 and `weight [n, K]` float32, whose rows sum to 1 (to 0 where no
    record was usable), K being 2 for mixed images and 1 otherwise; `position
    [n]` int32 in the global batch; the scalar `step`.

  Raises:
    faults.BadDataError: naming what cannot be used.
  """
  mine = spec.shards // process_count
  shards = range(process_index * mine, (process_index + 1) * mine)
  parts = spec.source.shards(spec.split, spec.shards)
  parts = [parts[shard] for shard in shards]
  groups = mine * spec.per_shard // spec.augmentation.examples_out
  maker = examples.ExampleMaker(
    spec.source,
    spec.augmentation,
    image_size=spec.image_size,
    seed=spec.seed,
    per_shard=spec.per_shard,
    groups=groups,
    first_position=shards.start * spec.per_shard,
    block=spec.block,
  )

  def make(step: int, careful: bool) -> tf.data.Dataset:
    return (
      _raw_records(spec, shards, parts, step)
      .batch(spec.augmentation.records_in, drop_remainder=True)
      .enumerate(step * groups)
      .map(maker.careful if careful else maker, CALLS)
      .batch(groups, drop_remainder=True)
      .map(_merge_groups)
      .prefetch(2)
      .with_options(_options())
    )

  slices = [file for part in parts for file in part]
  bad = faults.BadRecords(
    spec.source, spec.split, slices, spec.max_bad_records, log_fn
  )
  for step, batch in enumerate(faults.guarded(make, start_step, bad)):
    yield {**batch, 'step': np.int32(start_step + step)}


def _raw_records(
  spec: TrainSpec,
  shards: range,
  parts: list[list[sources.FileSlice]],
  step: int,
) -> tf.data.Dataset:
  """Streams (id, record), each shard's share of a batch in one piece."""
  augmentation = spec.augmentation
  share = spec.per_shard * augmentation.records_in // augmentation.examples_out
  streams, first_slice = [], 0
  for shard, slices in zip(shards, parts):
    streams.append(
      records.shard_stream(
        spec.source,
        slices,
        first_slice=first_slice,
        seed=spec.seed,
        shard=shard,
        shards=spec.shards,
        buffer=max(1, spec.shuffle_buffer // spec.shards),
        start=step * share,
      )
    )
    first_slice += len(slices)
  turns = tf.data.Dataset.range(len(shards) * share)
  return tf.data.Dataset.choose_from_datasets(
    streams, turns.map(lambda i: i // share).repeat(), False
  )


def _merge_groups(batch):
  """Maps `[groups, examples, ...]` to `[groups x examples, ...]`."""
  return {
    name: tf.reshape(value, [-1, *value.shape[2:]])
    for name, value in batch.items()
  }


def eval_batches(
  source: sources.Source,
  split: str,
  *,
  batch_size: int,
  preprocessing: preprocessing_lib.EvalPreprocessing,
  process_index: int = 0,
  process_count: int = 1,
  max_bad_records: int = 0,
  log_fn: LogFn = lambda line: None,
) -> Iterator[Batch]:
  """Streams every example of a split exactly once over all processes.

  Args:
    source: where records come from.
    split: TFDS split.
    batch_size: examples of the global batch, a multiple of `process_count`.
    preprocessing: what is done to each image.
    process_index: which part.
    process_count: of how many.
    max_bad_records: how many unusable records a process leaves out.
    note: shows a line to the person.

  Yields:
    `image [n, S, S, 3]` float32 in pixel units, `label [n]` int32 and
    `mask [n]` float32, which is 0 where the batch was padded or a record
    unusable. All processes get the same number of batches, as collectives need.

  Raises:
    faults.BadDataError: naming what cannot be used.
  """
  parts = source.shards(split, process_count)
  local = batch_size // process_count
  batches = -(-max(map(sources.total_examples, parts)) // local)

  def view(record: tf.Tensor):
    encoded, label = source.parse(record)
    image = preprocess.decode_and_crop(encoded, preprocessing)
    return image, label, examples.in_range(label, source)

  def example(record_id, view):
    image, label, usable = view
    mask = tf.cast(usable, tf.float32)
    return {
      'image': image,
      'label': label,
      'mask': mask,
      'id': record_id,
      'usable': usable,
    }

  nothing = examples.no_view(preprocessing.size)
  padding = {**example(tf.constant(-1, tf.int64), nothing), 'usable': True}

  def make(start: int, careful: bool) -> tf.data.Dataset:
    look = faults.carefully(view, nothing) if careful else view
    return (
      records.in_order(source, parts[process_index])
      .skip(start * local)
      .map(lambda i, record: example(i, look(record)), CALLS)
      .concatenate(tf.data.Dataset.from_tensors(padding).repeat())
      .batch(local)
      .take(batches - start)
      .prefetch(2)
      .with_options(_options())
    )

  yield from faults.guarded(
    make,
    0,
    faults.BadRecords(
      source, split, parts[process_index], max_bad_records, log_fn
    ),
  )


def _options() -> tf.data.Options:
  options = tf.data.Options()
  options.deterministic = True
  # Its thread may sleep for a minute before it lets a pipeline end.
  options.autotune.enabled = False
  return options
