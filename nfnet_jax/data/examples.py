"""From raw records to training examples: decode, crop, mix, augment."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from nfnet_jax import preprocessing
from nfnet_jax.data import (
  augment,
  autoaugment,
  faults,
  mix,
  preprocess,
  sources,
)

# Random draws of an example, by purpose.
_SHIFT, _FLIP, _CROP, _MIX, _AUGMENT = range(5)
# Distance between the draws of two raw images that are mixed.
_NEXT_IMAGE = 16


class Decoded(NamedTuple):
  """A decoded and cropped record.

  Attributes:
    image: float32 `[S, S, 3]`, or uint8 `[H, W, 3]` before it is cropped.
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
    # Examples of a shard's batch that lie between two copies of an image.
    self._stride = per_shard // augmentation.multiplicity
    self._augment = _operations(augmentation, image_size)

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
      `image`, `label`, `weight` and `position` with leading axes
      `[multiplicity, examples_per_copy]`; `id` and `usable`, both
      `[records_per_group]`.
    """
    ids, raw = numbered_records
    step, position = group // self._groups, self._first_of(group)
    if self._augmentation.multiplicity == 1:
      decode, otherwise = self._decode_and_crop, unusable(self._size)
    else:
      decode, otherwise = self._decode, unusable(1, tf.uint8)
    if skip_errors:
      decode = faults.with_fallback(decode, otherwise)
    decoded = [
      decode(raw[i], self._seed(step, position, i * _NEXT_IMAGE))
      for i in range(self._augmentation.records_per_group)
    ]
    if self._augmentation.multiplicity == 1:
      examples = self._examples(decoded, step, position)
      examples = tf.nest.map_structure(lambda x: x[None], examples)
    else:
      examples = self._copies(decoded, step, position)
    usable = tf.stack([record.is_usable for record in decoded])
    return {**examples, 'id': ids, 'usable': usable}

  def _first_of(self, group: tf.Tensor) -> tf.Tensor:
    """Return the position in the global batch of a group's first example.

    The first copies of all images of a shard come first, then the second ones,
    and so on. With MixUp and CutMix, an image gets both.
    """
    index = group % self._groups
    per_shard = self._stride // self._augmentation.examples_per_copy
    shard, place = index // per_shard, index % per_shard
    first = self._first_position + shard * self._per_shard
    return first + place * self._augmentation.examples_per_copy

  def _copies(
    self, decoded: list[Decoded], step: tf.Tensor, first: tf.Tensor
  ) -> dict[str, tf.Tensor]:
    """Crop, mix and augment decoded images `multiplicity` times."""

    def copy(index: tf.Tensor) -> dict[str, tf.Tensor]:
      position = first + index * self._stride
      cropped = []
      for i, record in enumerate(decoded):
        seed = self._seed(step, position, i * _NEXT_IMAGE)
        image = record.image
        if self._augmentation.crop == 'distorted':
          image = preprocess.cut(image, self._window(tf.shape(image), seed))
        cropped.append(record._replace(image=self._finish(image, seed)))
      return self._examples(cropped, step, position)

    indices = tf.range(self._augmentation.multiplicity, dtype=tf.int64)
    return tf.map_fn(copy, indices, fn_output_signature=self._dtypes())

  def _dtypes(self) -> dict[str, tf.DType]:
    """Return the dtypes of examples."""
    return {
      'image': tf.uint8 if self._augment else tf.float32,
      'label': tf.int32,
      'weight': tf.float32,
      'position': tf.int32,
    }

  def _seed(self, step: tf.Tensor, position: tf.Tensor, draw: int) -> tf.Tensor:
    return tf.stack([self._root * 2**32 + step, position * 2**8 + draw])

  def _decode(self, record: tf.Tensor, seed: tf.Tensor) -> Decoded:
    """Decode a raw record to the whole image."""
    encoded, label = self._source.parse(record)
    image = preprocess.decode(encoded)
    return Decoded(image, label, is_in_range(label, self._source))

  def _decode_and_crop(self, record: tf.Tensor, seed: tf.Tensor) -> Decoded:
    """Decode only what is cropped, and finish the crop."""
    encoded, label = self._source.parse(record)
    reduce_to = self._size if self._augmentation.jpeg_scaling else None
    if self._augmentation.crop == 'distorted':
      window = lambda shape: self._window(shape, seed)
      image = preprocess.decode_window(encoded, window, reduce_to)
    elif reduce_to:
      image = preprocess.decode_window(
        encoded, preprocess.whole_window, reduce_to
      )
    else:
      image = preprocess.decode(encoded)
    image = self._finish(image, seed)
    return Decoded(image, label, is_in_range(label, self._source))

  def _window(self, shape: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    return preprocess.distorted_window(shape, self._size, _salt(seed, _CROP))

  def _finish(self, image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Flip, resize and shift a crop."""
    augmentation = self._augmentation
    if augmentation.flip:
      image = preprocess.random_flip(image, _salt(seed, _FLIP))
    image = preprocess.resize(image, self._size)
    if augmentation.shift:
      image = preprocess.random_shift(
        image, augmentation.shift, _salt(seed, _SHIFT)
      )
    return image

  def _examples(
    self, decoded: list[Decoded], step: tf.Tensor, position: tf.Tensor
  ) -> dict[str, tf.Tensor]:
    """Return the examples of images, with a leading axis."""
    # The second example mixes the same images in the other order.
    examples = [
      self._example(decoded[i:] + decoded[:i], step, position + i)
      for i in range(self._augmentation.examples_per_copy)
    ]
    return tf.nest.map_structure(lambda *x: tf.stack(x), *examples)

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
    if self._augment:
      seed = self._seed(step, position, _AUGMENT)
      image = self._augment(mix.to_uint8(image), seed)
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


def _operations(
  augmentation: preprocessing.Augmentation, size: int
) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None:
  """Return the operations on uint8 images that follow mixing, if any."""
  if augmentation.augment == 'autoaugment':
    return autoaugment.AutoAugment(size)
  if augmentation.randaugment_layers:
    return augment.RandAugment(
      size, augmentation.randaugment_layers, augmentation.randaugment_magnitude
    )
  return None


def unusable(size: int, dtype: tf.DType = tf.float32) -> Decoded:
  """Return the placeholder of a record that cannot be used."""
  image = tf.zeros([size, size, 3], dtype)
  return Decoded(image, tf.constant(0), tf.constant(False))


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
