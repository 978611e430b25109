"""MixUp and CutMix: the mixed image and the first image's label weight."""

from __future__ import annotations

import tensorflow as tf

from nfnet_jax.data import augment


def mixup(
  first: tf.Tensor, second: tf.Tensor, seed: tf.Tensor, alpha: float = 0.2
) -> tuple[tf.Tensor, tf.Tensor]:
  """Average two images with weights (share, 1 - share).

  Args:
    first: float32 `[H, W, 3]`.
    second: likewise.
    seed: two integers.
    alpha: the share is drawn from Beta(alpha, alpha).

  Returns:
    The image, and the share of the first one: a float32 scalar.

  Source: Zhang et al., arXiv 1710.09412.
  """
  a, b = tf.unstack(tf.random.stateless_gamma([2], seed, alpha))
  share = tf.math.divide_no_nan(a, a + b)  # Both may underflow, rarely.
  return share * first + (1 - share) * second, share


def cutmix(
  first: tf.Tensor, second: tf.Tensor, seed: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
  """Combine a box of the first image with the second image around it.

  The box has sides of sqrt(1 - u) of the image's, u uniform, at a uniform
  centre, and is cut at the border.

  Args:
    first: float32 `[S, S, 3]`.
    second: likewise.
    seed: two integers.

  Returns:
    The image, and the share of the first one: the area of the cut box.

  Source: Yun et al., arXiv 1905.04899, whose box takes the second image.
  """
  size = first.shape[0]
  u, y, x = tf.unstack(tf.random.stateless_uniform([3], seed))
  side = tf.cast(size * tf.sqrt(1 - u), tf.int32)
  top, bottom = _interval(y, side, size)
  left, right = _interval(x, side, size)
  box = first[top:bottom, left:right]
  area = (bottom - top) * (right - left)
  share = tf.cast(area, tf.float32) / (size * size)
  return augment.paste(box, second, top, left), share


def _interval(
  centre: tf.Tensor, length: tf.Tensor, size: int
) -> tuple[tf.Tensor, tf.Tensor]:
  """Return the part within [0, size) of an interval at centre x size."""
  begin = tf.cast(centre * size, tf.int32) - length // 2
  return tf.maximum(begin, 0), tf.minimum(begin + length, size)


def to_uint8(image: tf.Tensor) -> tf.Tensor:
  """Clip to 0..255 and truncate."""
  return tf.saturate_cast(image, tf.uint8)
