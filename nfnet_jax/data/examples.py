"""From raw records to training examples: decode, crop, mix, augment."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from nfnet_jax import preprocessing
from nfnet_jax.data import augment, faults, mix, preprocess, sources

# Random draws of an example, by purpose.
_SHIFT, _FLIP, _CROP, _MIX, _AUGMENT = range(5)
# Distance between the draws of two raw images that are mixed.
_NEXT_IMAGE = 16


class Decoded(NamedTuple):
  """A decoded and cropped record.

  Attributes:
    image: float32 `[S, S, 3]`.
    label: an int32 scalar.
    is_usable: a bool scalar; False if the record could not be decoded or its
      label is not a class of the dataset.
  """

  image: tf.Tensor
  label: tf.Tensor
  is_usable: tf.Tensor


class TrainTransform:
  """Maps numbered groups of records to training examples.

  Args:
    source: dataset of the records.
    augmentation: see `preprocessing.Augmentation`.
    image_size: height and width in pixels.
    seed: root of all draws.
    per_shard: examples per shard and batch.
    groups: groups of records per batch of this process.
    first_position: offset of this process's part in the global batch.
    block: height and width in pixels of the blocks of space-to-depth.
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
      augment.RandAugment(
        image_size,
        augmentation.randaugment_layers,
        augmentation.randaugment_magnitude,
      )
      if augmentation.randaugment_layers
      else None
    )

  def __call__(
    self,
    group: tf.Tensor,
    numbered_records: tuple[tf.Tensor, tf.Tensor],
    skip_errors: bool = False,
  ) -> dict[str, tf.Tensor]:
    """Return the examples of a group.

    Args:
      group: number of the group since the start of the run.
      numbered_records: ids and raw records, both `[records_per_group]`.
      skip_errors: whether to mark records that fail as unusable instead of
        raising an error.

    Returns:
      `image`, `label`, `weight` and `position` with a leading axis
      `[examples_per_group]`; `id` and `usable`, both `[records_per_group]`.
    """
    ids, raw = numbered_records
    decode: Callable = self._decode
    if skip_errors:
      decode = faults.with_fallback(decode, unusable(self._size))
    count = self._augmentation.examples_per_group
    position = self._first_position + group % self._groups * count
    step = group // self._groups
    decoded = [
      decode(raw[i], self._seed(step, position, i * _NEXT_IMAGE))
      for i in range(self._augmentation.records_per_group)
    ]
    # The second example of a group mixes the same images in the other order.
    examples = [
      self._example(decoded[i:] + decoded[:i], step, position + i)
      for i in range(count)
    ]
    stacked = tf.nest.map_structure(lambda *x: tf.stack(x), *examples)
    usable = tf.stack([record.is_usable for record in decoded])
    return {**stacked, 'id': ids, 'usable': usable}

  def _seed(self, step: tf.Tensor, position: tf.Tensor, draw: int) -> tf.Tensor:
    return tf.stack([self._root * 2**32 + step, position * 2**8 + draw])

  def _decode(self, record: tf.Tensor, seed: tf.Tensor) -> Decoded:
    """Decode, crop, flip, resize and shift a raw record."""
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
    return Decoded(image, label, is_in_range(label, self._source))

  def _example(
    self, decoded: list[Decoded], step: tf.Tensor, position: tf.Tensor
  ) -> dict[str, tf.Tensor]:
    """Mix and augment; CutMix keeps a box of the first image."""
    if self._augmentation.mixes:
      first, second = decoded
      seed = self._seed(step, position, _MIX)
      image, labels, weights = self._mix(first, second, position, seed)
    else:
      ((image, label, is_usable),) = decoded
      labels, weights = label[None], tf.cast(is_usable, tf.float32)[None]
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

  def _mix(
    self,
    first: Decoded,
    second: Decoded,
    position: tf.Tensor,
    seed: tf.Tensor,
  ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    any_usable = first.is_usable | second.is_usable
    first, second = _replace_unusable(first, second)
    mixup = lambda: mix.mixup(first.image, second.image, seed)
    cutmix = lambda: mix.cutmix(first.image, second.image, seed)
    if self._augmentation.mixup and self._augmentation.cutmix:
      in_first_half = position % self._per_shard * 2 < self._per_shard
      image, share = tf.cond(in_first_half, mixup, cutmix)
    else:
      image, share = mixup() if self._augmentation.mixup else cutmix()
    weights = tf.stack([share, 1 - share]) * tf.cast(any_usable, tf.float32)
    return image, tf.stack([first.label, second.label]), weights


def unusable(size: int) -> Decoded:
  """Return the placeholder of a record that cannot be used."""
  return Decoded(tf.zeros([size, size, 3]), tf.constant(0), tf.constant(False))


def is_in_range(label: tf.Tensor, source: sources.Source) -> tf.Tensor:
  """Return whether a label is a class of the dataset."""
  return (label >= 0) & (label < source.num_classes)


def _replace_unusable(
  first: Decoded, second: Decoded
) -> tuple[Decoded, Decoded]:
  """Replace an unusable record by the other one."""
  return tf.cond(
    first.is_usable & second.is_usable,
    lambda: (first, second),
    lambda: tf.cond(
      first.is_usable, lambda: (first, first), lambda: (second, second)
    ),
  )


def _salt(seed: tf.Tensor, draw: int) -> tf.Tensor:
  return seed + tf.constant([0, draw], seed.dtype)
