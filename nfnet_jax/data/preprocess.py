"""Decoding, cropping and resizing of images.

Every function is deterministic: random ones take a `tf.random` stateless seed.
Windows are int32 `[y, x, height, width]`.
"""

from __future__ import annotations

from collections.abc import Callable
import functools

import tensorflow as tf

from nfnet_jax import preprocessing as preprocessing_lib

# Area and aspect ratio of a random crop, the share of the image that it must
# cover (which makes the minimum area 10 %), and the number of attempts.
_AREA = (0.08, 1.0)
_MIN_COVERED = 0.1
_ASPECT = (3 / 4, 4 / 3)
_ATTEMPTS = 10
# Factors by which a JPEG decoder can reduce height and width.
_REDUCTIONS = (1, 2, 4, 8)


def decode(encoded: tf.Tensor) -> tf.Tensor:
  """Decode JPEG, PNG, GIF or BMP bytes to uint8 `[H, W, 3]`."""
  return tf.io.decode_image(encoded, channels=3, expand_animations=False)


def decode_window(
  encoded: tf.Tensor,
  choose: Callable[[tf.Tensor], tf.Tensor],
  reduce_to: int | None = None,
) -> tf.Tensor:
  """Decode a window of an image to uint8 `[height, width, 3]`.

  Only the window of a JPEG is decoded. Where its chroma is subsampled, colours
  at the window's left and right edge differ a little from those of the whole
  image.

  Args:
    encoded: bytes as for `decode`.
    choose: maps the image's int32 shape `[H, W, 3]` to a window of it.
    reduce_to: if given, the decoder reduces a JPEG to 1/2, 1/4 or 1/8, as far
      as no side of the window becomes smaller than this.
  """

  def jpeg():
    window = choose(tf.io.extract_jpeg_shape(encoded))
    if reduce_to is None:
      return tf.io.decode_and_crop_jpeg(encoded, window, channels=3)
    return _decode_reduced(encoded, window, reduce_to)

  def other():
    image = decode(encoded)
    return cut(image, choose(tf.shape(image)))

  image = tf.cond(tf.io.is_jpeg(encoded), jpeg, other)
  image.set_shape([None, None, 3])
  return image


def _decode_reduced(
  encoded: tf.Tensor, window: tf.Tensor, reduce_to: int
) -> tf.Tensor:
  """Decode a window of a JPEG at the largest reduction that is allowed."""

  def decode_at(reduction: int) -> tf.Tensor:
    return tf.io.decode_and_crop_jpeg(
      encoded, window // reduction, channels=3, ratio=reduction
    )

  sizes = tf.constant([reduce_to * reduction for reduction in _REDUCTIONS[1:]])
  index = tf.math.count_nonzero(
    tf.reduce_min(window[2:]) >= sizes, dtype=tf.int32
  )
  # The reduction is an attribute of the operation, not an argument.
  branches = [functools.partial(decode_at, each) for each in _REDUCTIONS]
  return tf.switch_case(index, branches)


def whole_window(shape: tf.Tensor) -> tf.Tensor:
  """Return the window that is the whole image."""
  return tf.stack([0, 0, shape[0], shape[1]])


def distorted_window(shape: tf.Tensor, size: int, seed: tf.Tensor) -> tf.Tensor:
  """Sample a window of 10 to 100 % of the area, of aspect 3:4 to 4:3.

  The published minimum area is 8 %, but the window must also cover 10 % of the
  image. The window is that of `centre_window` if ten attempts find none inside
  the image, or if it is the whole image, as published.

  Source: arXiv 2102.06171, appendix A.3, after Szegedy et al. (1409.4842).
  """
  begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
    shape,
    tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
    seed=seed,
    min_object_covered=_MIN_COVERED,
    aspect_ratio_range=_ASPECT,
    area_range=_AREA,
    max_attempts=_ATTEMPTS,
  )
  window = tf.concat([begin[:2], extent[:2]], axis=0)
  is_whole = tf.reduce_all(extent[:2] == shape[:2])
  return tf.where(is_whole, centre_window(shape, size), window)


def centre_window(shape: tf.Tensor, size: int, margin: int = 32) -> tf.Tensor:
  """Return the central square, without the margin's share of the image.

  Its side is size / (size + margin) of the image's shorter one: resized to
  `size`, it equals the centre of the image resized to `size + margin`.
  """
  height, width = shape[0], shape[1]
  shorter = tf.cast(tf.minimum(height, width), tf.float32)
  side = tf.maximum(tf.cast(size / (size + margin) * shorter, tf.int32), 1)
  y, x = (height - side + 1) // 2, (width - side + 1) // 2
  return tf.stack([y, x, side, side])


def resize(image: tf.Tensor, size: int) -> tf.Tensor:
  """Resize to float32 `[size, size, 3]`, bicubic without antialiasing.

  The aspect ratio is not kept and values may leave 0..255, as published.
  """
  # TensorFlow resizes float32 faster than uint8, with equal results; see
  # experiments/input_pipeline/resize.py.
  image = tf.cast(image, tf.float32)
  image = tf.image.resize(image, (size, size), tf.image.ResizeMethod.BICUBIC)
  image.set_shape([size, size, 3])
  return image


def decode_and_crop(
  encoded: tf.Tensor, preprocessing: preprocessing_lib.EvalPreprocessing
) -> tf.Tensor:
  """Decode and `crop` an image; of a JPEG, only the part that is needed.

  Args:
    encoded: bytes as for `decode`.
    preprocessing: size, crop and margin.
  """
  if preprocessing.crop == 'centre':
    size, margin = preprocessing.size, preprocessing.margin
    image = decode_window(
      encoded, lambda shape: centre_window(shape, size, margin)
    )
  else:
    image = decode(encoded)
  return _resize_for_evaluation(image, preprocessing)


def crop(
  image: tf.Tensor, preprocessing: preprocessing_lib.EvalPreprocessing
) -> tf.Tensor:
  """Crop and resize an image for evaluation, to float32 `[size, size, 3]`.

  Args:
    image: `[H, W, 3]`.
    preprocessing: size, crop and margin.

  Source: arXiv 2102.06171, appendix A.1; 'squash' follows the released code,
  which resizes both sides without regard to the aspect ratio.
  """
  if preprocessing.crop == 'centre':
    size, margin = preprocessing.size, preprocessing.margin
    image = cut(image, centre_window(tf.shape(image), size, margin))
  return _resize_for_evaluation(image, preprocessing)


def _resize_for_evaluation(
  image: tf.Tensor, preprocessing: preprocessing_lib.EvalPreprocessing
) -> tf.Tensor:
  """Resize a central square, or a whole image of which the margin is cut."""
  size, margin = preprocessing.size, preprocessing.margin
  if preprocessing.crop == 'centre':
    return resize(image, size)
  start = margin // 2
  resized = resize(image, size + margin)
  return resized[start : start + size, start : start + size]


def cut(image: tf.Tensor, window: tf.Tensor) -> tf.Tensor:
  """Return a window of `[H, W, C]`."""
  y, x, height, width = tf.unstack(window)
  return image[y : y + height, x : x + width]


def random_shift(image: tf.Tensor, pixels: int, seed: tf.Tensor) -> tf.Tensor:
  """Shift `[H, W, 3]` by up to `pixels` in y and x; the border is mirrored."""
  height, width, channels = image.shape
  paddings = [[pixels, pixels], [pixels, pixels], [0, 0]]
  padded = tf.pad(image, paddings, 'SYMMETRIC')
  return tf.image.stateless_random_crop(padded, (height, width, channels), seed)


def random_flip(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
  """Mirror left and right with probability 1/2."""
  return tf.image.stateless_random_flip_left_right(image, seed)
