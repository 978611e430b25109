"""From raw records to training examples: decode, crop, mix, augment."""

import tensorflow as tf

from nfnet_jax import preprocessing
from nfnet_jax.data import augment, faults, mix, preprocess, sources

# What an example's draws are for, and how far apart those of two raw images
# are that are mixed.
_SHIFT, _FLIP, _CROP, _MIX, _AUGMENT = range(5)
_NEXT_IMAGE = 16


class ExampleMaker:
  """Makes numbered groups of records into examples, as a map of a dataset.

  Args:
    source: what the records are of.
    augmentation: see `preprocessing.Augmentation`.
    image_size: pixels a side.
    seed: root of all draws.
    per_shard: examples of one shard in a batch.
    groups: groups of records in a batch of this process.
    first_position: place of this process's part in the global batch.
    block: pixels a side of the blocks that images are cut into.
  """

  def __init__(
    self,
    source: sources.Source,
    augmentation: preprocessing.Augmentation,
    *,
    image_size: int,
    seed: int,
    per_shard: int,
    groups: int,
    first_position: int,
    block: int = 1,
  ):
    self._source = source
    self._augmentation = augmentation
    self._size = image_size
    self._root = seed
    self._per_shard = per_shard
    self._groups = groups
    self._first_position = first_position
    self._block = block
    self._rand_augment = (
      augmentation.randaugment_layers
      and augment.RandAugment(
        image_size,
        augmentation.randaugment_layers,
        augmentation.randaugment_magnitude,
      )
    )

  def __call__(self, group, numbered_records, view=None):
    """Makes a group's examples.

    Args:
      group: its number since the start of the run.
      numbered_records: ids and raw records, both `[records_in]`.
      view: what decodes and crops a record.

    Returns:
      `image`, `label`, `weight` and `position` with a leading axis
      `[examples_out]`; `id` and `usable`, both `[records_in]`.
    """
    ids, raw = numbered_records
    view = view or self._view
    made = self._augmentation.examples_out
    position = self._first_position + group % self._groups * made
    step = group // self._groups
    views = [
      view(raw[i], self._seed(step, position, i * _NEXT_IMAGE))
      for i in range(self._augmentation.records_in)
    ]
    examples = [
      self._example(views[i:] + views[:i], step, position + i)
      for i in range(made)
    ]
    stacked = tf.nest.map_structure(lambda *x: tf.stack(x), *examples)
    usable = tf.stack([usable for _, _, usable in views])
    return {**stacked, 'id': ids, 'usable': usable}

  def careful(self, group, numbered_records):
    """Does the same, but a record that fails is marked and left out."""
    view = faults.carefully(self._view, no_view(self._size))
    return self(group, numbered_records, view)

  def _seed(self, step: tf.Tensor, position: tf.Tensor, draw: int) -> tf.Tensor:
    return tf.stack([self._root * 2**32 + step, position * 2**8 + draw])

  def _view(self, record: tf.Tensor, seed: tf.Tensor):
    """Makes a raw record into (image, label, whether it is usable)."""
    augmentation, size = self._augmentation, self._size
    encoded, label = self._source.parse(record)
    if augmentation.crop == 'distorted':
      image = preprocess.decode_window(
        encoded,
        lambda shape: preprocess.distorted_window(
          shape, size, _salt(seed, _CROP)
        ),
      )
    else:
      image = preprocess.decode(encoded)
    if augmentation.flip:
      image = preprocess.random_flip(image, _salt(seed, _FLIP))
    image = preprocess.resize(image, size)
    if augmentation.shift:
      image = preprocess.random_shift(
        image, augmentation.shift, _salt(seed, _SHIFT)
      )
    return image, label, in_range(label, self._source)

  def _example(self, views: list, step: tf.Tensor, position: tf.Tensor):
    """Mixes and augments; CutMix keeps a box of the first view."""
    if self._augmentation.mixes:
      seed = self._seed(step, position, _MIX)
      image, labels, weights = self._mix(*views, position, seed)
    else:
      ((image, label, usable),) = views
      labels, weights = label[None], tf.cast(usable, tf.float32)[None]
    if self._rand_augment:
      seed = self._seed(step, position, _AUGMENT)
      image = self._rand_augment(mix.to_uint8(image), seed)
    if self._block > 1:
      image = tf.nn.space_to_depth(image[None], self._block)[0]
    return {
      'image': image,
      'label': labels,
      'weight': weights,
      'position': tf.cast(position, tf.int32),
    }

  def _mix(self, first, second, position: tf.Tensor, seed: tf.Tensor):
    any_usable = first[2] | second[2]
    first, second = _replace_unusable(first, second)
    mixup = lambda: mix.mixup(first[0], second[0], seed)
    cutmix = lambda: mix.cutmix(first[0], second[0], seed)
    if self._augmentation.mixup and self._augmentation.cutmix:
      in_first_half = position % self._per_shard * 2 < self._per_shard
      image, share = tf.cond(in_first_half, mixup, cutmix)
    else:
      image, share = mixup() if self._augmentation.mixup else cutmix()
    weights = tf.stack([share, 1 - share]) * tf.cast(any_usable, tf.float32)
    return image, tf.stack([first[1], second[1]]), weights


def no_view(size: int):
  """Returns what stands for a record that cannot be used."""
  return tf.zeros([size, size, 3]), tf.constant(0), tf.constant(False)


def in_range(label: tf.Tensor, source: sources.Source) -> tf.Tensor:
  """Says whether a label is one of the dataset's classes."""
  return (label >= 0) & (label < source.num_classes)


def _replace_unusable(first, second):
  """Puts the other view in the place of one that is not usable."""
  return tf.cond(
    first[2] & second[2],
    lambda: (first[:2], second[:2]),
    lambda: tf.cond(
      first[2], lambda: (first[:2],) * 2, lambda: (second[:2],) * 2
    ),
  )


def _salt(seed: tf.Tensor, draw: int) -> tf.Tensor:
  return seed + tf.constant([0, draw], seed.dtype)
