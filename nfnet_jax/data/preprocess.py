"""From an encoded image to the pixels that the network sees.

Every function is deterministic: random ones take a `tf.random` stateless seed.
Windows are int32 `[y, x, height, width]`.
"""

from collections.abc import Callable

import tensorflow as tf

from nfnet_jax import preprocessing as preprocessing_lib

# Area and aspect ratio of a random crop, how much of the image it must hold
# (which makes the least area a tenth), and how often it is tried.
_AREA = (0.08, 1.0)
_HELD = 0.1
_ASPECT = (3 / 4, 4 / 3)
_ATTEMPTS = 10


def decode(encoded: tf.Tensor) -> tf.Tensor:
  """Decodes JPEG, PNG, GIF or BMP bytes to uint8 `[H, W, 3]`."""
  return tf.io.decode_image(encoded, channels=3, expand_animations=False)


def decode_window(
  encoded: tf.Tensor, choose: Callable[[tf.Tensor], tf.Tensor]
) -> tf.Tensor:
  """Decodes a window of an image to uint8 `[height, width, 3]`.

  Of a JPEG no more is decoded than the window needs; where its colours have a
  lower resolution, they differ a little at the window's left and right edge
  from those of the whole image decoded.

  Args:
    encoded: bytes as `decode` takes them.
    choose: maps the image's int32 shape `[H, W, 3]` to a window of it.
  """

  def jpeg():
    shape = tf.io.extract_jpeg_shape(encoded)
    return tf.io.decode_and_crop_jpeg(encoded, choose(shape), channels=3)

  def other():
    image = decode(encoded)
    y, x, height, width = tf.unstack(choose(tf.shape(image)))
    return image[y : y + height, x : x + width]

  image = tf.cond(tf.io.is_jpeg(encoded), jpeg, other)
  image.set_shape([None, None, 3])
  return image


def distorted_window(shape: tf.Tensor, size: int, seed: tf.Tensor) -> tf.Tensor:
  """Samples a window of 10 to 100 % of the area, of aspect 3:4 to 4:3.

  The published least area is 8 %, but also that a tenth of the image be held.
  Where ten attempts find none that lies in the image, and where the window is
  the whole image, it is `centre_window`'s, as published.

  Source: arXiv 2102.06171, appendix A.3, after Szegedy et al. (1409.4842).
  """
  begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
    shape,
    tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
    seed=seed,
    min_object_covered=_HELD,
    aspect_ratio_range=_ASPECT,
    area_range=_AREA,
    max_attempts=_ATTEMPTS,
  )
  window = tf.concat([begin[:2], extent[:2]], axis=0)
  is_whole = tf.reduce_all(extent[:2] == shape[:2])
  return tf.where(is_whole, centre_window(shape, size), window)


def centre_window(shape: tf.Tensor, size: int, margin: int = 32) -> tf.Tensor:
  """Returns the square in the centre that keeps the margin's share outside.

  Its side is size / (size + margin) of the image's shorter one: resized to
  `size`, it equals the centre of the image resized to `size + margin`.
  """
  height, width = shape[0], shape[1]
  shorter = tf.cast(tf.minimum(height, width), tf.float32)
  side = tf.maximum(tf.cast(size / (size + margin) * shorter, tf.int32), 1)
  y, x = (height - side + 1) // 2, (width - side + 1) // 2
  return tf.stack([y, x, side, side])


def resize(image: tf.Tensor, size: int) -> tf.Tensor:
  """Resizes to float32 `[size, size, 3]`, bicubic without antialiasing.

  The aspect ratio is not kept and values may leave 0..255, as published.
  """
  image = tf.image.resize(image, (size, size), tf.image.ResizeMethod.BICUBIC)
  image.set_shape([size, size, 3])
  return image


def squash(image: tf.Tensor, size: int, margin: int) -> tf.Tensor:
  """Resizes both sides to `size + margin` and cuts the margin off.

  Args:
    image: `[H, W, 3]`.
    size: pixels a side of the result, float32 `[size, size, 3]`.
    margin: pixels cut in all; 32 as published, 0 for small images.

  Source: arXiv 2102.06171, appendix A.1; that both sides are resized without
  regard to the aspect ratio is the released code's reading of it.
  """
  start = margin // 2
  resized = resize(image, size + margin)
  return resized[start : start + size, start : start + size]


def centre_crop(image: tf.Tensor, size: int, margin: int) -> tf.Tensor:
  """Resizes the square in the centre, which keeps the aspect ratio.

  Args:
    image: `[H, W, 3]`.
    size: pixels a side of the result, float32 `[size, size, 3]`.
    margin: see `centre_window`.
  """
  y, x, height, width = tf.unstack(centre_window(tf.shape(image), size, margin))
  return resize(image[y : y + height, x : x + width], size)


# By the names of `preprocessing.CROPS`.
CROPS = {'squash': squash, 'centre': centre_crop}


def decode_and_crop(
  encoded: tf.Tensor, preprocessing: preprocessing_lib.EvalPreprocessing
) -> tf.Tensor:
  """Decodes an image and crops it for evaluation, float32 `[size, size, 3]`.

  Args:
    encoded: bytes as `decode` takes them.
    preprocessing: size, crop and margin.
  """
  crop, size = preprocessing.crop, preprocessing.size
  margin = preprocessing.margin
  if crop == 'centre':
    choose = lambda shape: centre_window(shape, size, margin)
    return resize(decode_window(encoded, choose), size)
  return CROPS[crop](decode(encoded), size, margin)


def random_shift(image: tf.Tensor, pixels: int, seed: tf.Tensor) -> tf.Tensor:
  """Moves `[H, W, 3]` by up to `pixels` each way; the border is mirrored."""
  height, width, channels = image.shape
  mode = [[pixels, pixels], [pixels, pixels], [0, 0]]
  padded = tf.pad(image, mode, 'SYMMETRIC')
  return tf.image.stateless_random_crop(padded, (height, width, channels), seed)


def random_flip(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
  """Mirrors left and right with probability 1/2."""
  return tf.image.stateless_random_flip_left_right(image, seed)
