"""Batches for training and evaluation, the same for any number of processes.

A run has a fixed number of data shards. Shard s reads its own slice of the
data, in an order that is a function of (seed, epoch, s), and fills its own part
of every global batch; augmentation is a function of (seed, step, position).
So batches depend neither on processes and devices nor on where a run was
resumed.
"""

from collections.abc import Callable, Iterator
import dataclasses
import itertools

import numpy as np
import tensorflow as tf

from nfnet_jax.data import preprocess, sources

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """What happens to a training image after decoding.

  Attributes:
    shift: pixels of random translation, at the final size.
    flip: whether images are mirrored at random.
  """

  shift: int = 0
  flip: bool = False


@dataclasses.dataclass(frozen=True)
class TrainSpec:
  """A training stream.

  Attributes:
    source: where records come from.
    split: TFDS split.
    batch_size: examples of the global batch, a multiple of `shards`.
    image_size: pixels a side.
    shards: data shards of the run, a multiple of the number of processes.
    seed: root of order and augmentation.
    augmentation: see `Augmentation`.
    shuffle_buffer: records of a shard that are shuffled together; a buffer
      smaller than the shard shuffles approximately.
  """

  source: sources.Source
  split: str
  batch_size: int
  image_size: int
  shards: int
  seed: int
  augmentation: Augmentation = Augmentation()
  shuffle_buffer: int = 16_384


def train_batches(
  spec: TrainSpec,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """Streams this process's part of the global batches, without end.

  Args:
    spec: the stream.
    start_step: the first batch to deliver. At most an epoch's raw records are
      skipped to get there, undecoded.
    process_index: which part.
    process_count: of how many; divides `spec.shards`.

  Yields:
    `image [n, S, S, 3]` float32 in pixel units, `label [n]` int32,
    `position [n]` int32 in the global batch, and the scalar `step`.
  """
  per_process = spec.shards // process_count
  first = process_index * per_process
  per_shard = spec.batch_size // spec.shards
  slices = spec.source.shards(spec.split, spec.shards)
  streams = [
    _shard_stream(slices[s], spec, s, start_step * per_shard)
    for s in range(first, first + per_process)
  ]
  turns = tf.data.Dataset.range(per_process * per_shard)
  turns = turns.map(lambda i: i // per_shard).repeat()
  records = tf.data.Dataset.choose_from_datasets(
    streams, turns, stop_on_empty_dataset=False
  )
  local = per_process * per_shard
  dataset = (
    records.enumerate(start_step * local)
    .map(_train_example(spec, local, first * per_shard), tf.data.AUTOTUNE)
    .batch(local, drop_remainder=True)
    .prefetch(2)
    .with_options(_options())
  )
  for step, batch in zip(
    itertools.count(start_step), dataset.as_numpy_iterator()
  ):
    yield {**batch, 'step': np.int32(step)}


def _shard_stream(
  slices: list[sources.FileSlice], spec: TrainSpec, shard: int, start: int
) -> tf.data.Dataset:
  """Streams a shard's raw records from its `start`-th on, epoch by epoch."""
  size = sources.total_examples(slices)
  first_epoch, offset = divmod(start, size)

  def epoch(index: tf.Tensor) -> tf.data.Dataset:
    seeds = tf.random.stateless_uniform(
      [2],
      (spec.seed, index * spec.shards + shard),
      minval=None,
      maxval=None,
      dtype=tf.int64,
    )
    order = _files(slices).shuffle(
      len(slices), seeds[0], reshuffle_each_iteration=False
    )
    shuffled = _records(order).shuffle(
      min(size, spec.shuffle_buffer), seeds[1], reshuffle_each_iteration=False
    )
    return shuffled.skip(tf.where(index == first_epoch, np.int64(offset), 0))

  epochs = tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max)
  return epochs.flat_map(epoch)


def _files(slices: list[sources.FileSlice]) -> tf.data.Dataset:
  return tf.data.Dataset.from_tensor_slices(
    (
      [part.path for part in slices],
      np.asarray([part.skip for part in slices], np.int64),
      np.asarray([part.take for part in slices], np.int64),
    )
  )


def _records(files: tf.data.Dataset) -> tf.data.Dataset:
  return files.interleave(
    lambda path, skip, take: (
      tf.data.TFRecordDataset(path).skip(skip).take(take)
    ),
    cycle_length=16,
    block_length=16,
    num_parallel_calls=tf.data.AUTOTUNE,
    deterministic=True,
  )


def _train_example(
  spec: TrainSpec, local_batch: int, first_position: int
) -> Callable:
  """Returns the map from a numbered record of this process to an example."""

  def make(index: tf.Tensor, record: tf.Tensor):
    step = index // local_batch
    position = first_position + index % local_batch
    seed = tf.stack([spec.seed * 2**32 + step, position * 2**8])
    encoded, label = spec.source.parse(record)
    image = preprocess.resize(preprocess.decode(encoded), spec.image_size)
    if spec.augmentation.shift:
      image = preprocess.random_shift(image, spec.augmentation.shift, seed)
    if spec.augmentation.flip:
      image = preprocess.random_flip(
        image, seed + tf.constant([0, 1], tf.int64)
      )
    return {
      'image': image,
      'label': label,
      'position': tf.cast(position, tf.int32),
    }

  return make


def eval_batches(
  source: sources.Source,
  split: str,
  *,
  batch_size: int,
  image_size: int,
  margin: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """Streams every example of a split exactly once over all processes.

  Args:
    source: where records come from.
    split: TFDS split.
    batch_size: examples of the global batch, a multiple of `process_count`.
    image_size: pixels a side.
    margin: pixels resized to and cut off; see `preprocess.squash`.
    process_index: which part.
    process_count: of how many.

  Yields:
    `image [n, S, S, 3]` float32 in pixel units, `label [n]` int32 and
    `mask [n]` float32, which is 0 where the batch was padded. All processes get
    the same number of batches, as collectives need.
  """
  parts = source.shards(split, process_count)
  local = batch_size // process_count
  batches = -(-max(map(sources.total_examples, parts)) // local)

  def make(record: tf.Tensor):
    encoded, label = source.parse(record)
    image = preprocess.squash(preprocess.decode(encoded), image_size, margin)
    return {'image': image, 'label': label, 'mask': 1.0}

  examples = _records(_files(parts[process_index]))
  padding = tf.data.Dataset.from_tensors(
    {
      'image': tf.zeros((image_size, image_size, 3)),
      'label': tf.zeros((), tf.int32),
      'mask': 0.0,
    }
  )
  dataset = (
    examples.map(make, tf.data.AUTOTUNE)
    .concatenate(padding.repeat())
    .batch(local)
    .take(batches)
    .prefetch(2)
    .with_options(_options())
  )
  yield from dataset.as_numpy_iterator()


def _options() -> tf.data.Options:
  options = tf.data.Options()
  options.deterministic = True
  return options
