"""From an encoded image to the pixels that the network sees.

Every function is deterministic: random ones take a `tf.random` stateless seed.
"""

import tensorflow as tf


def decode(encoded: tf.Tensor) -> tf.Tensor:
  """Decodes JPEG, PNG, GIF or BMP bytes to uint8 `[H, W, 3]`."""
  return tf.io.decode_image(encoded, channels=3, expand_animations=False)


def resize(image: tf.Tensor, size: int) -> tf.Tensor:
  """Resizes to float32 `[size, size, 3]`, bicubic without antialiasing.

  The aspect ratio is not kept and values may leave 0..255, as published.
  """
  image = tf.image.resize(image, (size, size), tf.image.ResizeMethod.BICUBIC)
  image.set_shape([size, size, 3])
  return image


def squash(image: tf.Tensor, size: int, margin: int) -> tf.Tensor:
  """Resizes both sides to `size + margin`, then cuts the margin off.

  Args:
    image: `[H, W, 3]` of any aspect ratio.
    size: pixels a side of the result, float32 `[size, size, 3]`.
    margin: pixels cut in all; 32 as published, 0 for small images.

  Source: arXiv 2102.06171, appendix A.1; that both sides are resized without
  regard to the aspect ratio is the released code's reading of it.
  """
  start = margin // 2
  resized = resize(image, size + margin)
  return resized[start : start + size, start : start + size]


def random_shift(image: tf.Tensor, pixels: int, seed: tf.Tensor) -> tf.Tensor:
  """Moves `[H, W, 3]` by up to `pixels` each way; the border is mirrored."""
  height, width, channels = image.shape
  mode = [[pixels, pixels], [pixels, pixels], [0, 0]]
  padded = tf.pad(image, mode, 'SYMMETRIC')
  return tf.image.stateless_random_crop(padded, (height, width, channels), seed)


def random_flip(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
  """Mirrors left and right with probability 1/2."""
  return tf.image.stateless_random_flip_left_right(image, seed)
