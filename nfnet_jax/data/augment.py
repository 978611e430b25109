"""RandAugment on uint8 images: 16 operations, one drawn per layer.

Source: Cubuk et al., arXiv 1909.13719, with the magnitudes of arXiv 2102.06171,
appendix A.3, and the behaviour of the released pipeline, quirks included:

- An operation is always applied; only its sign (and Cutout's place) is random.
- At magnitude 5 the factor of Color, Contrast, Brightness and Sharpness is 1:
  they do nothing.
- Posterize is strongest at small magnitudes: it keeps 2 bits at 5, 6 at 15.
- Solarize's threshold wraps in uint8: 256 at magnitude 10 is 0 and inverts the
  whole image, 384 at 15 is 128.
- Contrast blends with a constant that depends on the image's size, not on its
  mean.

Images stay uint8. Measured in tf.data, a table lookup and `tf.where` of two
images cost several times as much as a few vectorised arithmetic operations, and
`tf.gather` twice as much as `tf.gather_nd`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import math

import numpy as np
import tensorflow as tf

_FILL = 128
_CHANNELS = 3

# Draws index this tuple, so its order matters.
OPERATIONS = (
  'AutoContrast',
  'Equalize',
  'Invert',
  'Rotate',
  'Posterize',
  'Solarize',
  'Color',
  'Contrast',
  'Brightness',
  'Sharpness',
  'ShearX',
  'ShearY',
  'TranslateX',
  'TranslateY',
  'Cutout',
  'SolarizeAdd',
)


class Operations:
  """The operations of one magnitude, on a uint8 image `[size, size, 3]`.

  Args:
    size: height and width in pixels.
    magnitude: strength of all operations, 0 to 30.
    translation: pixels that a unit of magnitude translates by.
  """

  def __init__(self, size: int, magnitude: int, translation: int = 10):
    self._magnitude = magnitude
    self._factor = magnitude / 10 * 1.8 + 0.1
    self._shift = translation * magnitude
    self._sources = _source_pixels(size, magnitude)

  def apply(self, name: str, image: tf.Tensor, draw: tf.Tensor) -> tf.Tensor:
    """Apply one operation.

    Args:
      name: one of `OPERATIONS`.
      image: uint8 `[size, size, 3]`.
      draw: three numbers in [0, 1): the sign, and Cutout's centre (y, x).
    """
    magnitude, factor = self._magnitude, self._factor
    signed = lambda size: tf.where(draw[0] < 0.5, -size, size)
    operations: dict[str, Callable[[], tf.Tensor]] = {
      'AutoContrast': lambda: _auto_contrast(image),
      'Equalize': lambda: _equalize(image),
      'Invert': lambda: 255 - image,
      'Rotate': lambda: self._move('Rotate', image, draw),
      'Posterize': lambda: _posterize(image, int(0.4 * magnitude)),
      'Solarize': lambda: _solarize(image, int(25.6 * magnitude) % 256),
      'Color': lambda: _color(image, factor),
      'Contrast': lambda: _contrast(image, factor),
      'Brightness': lambda: _blend(0.0, _to_float(image), factor),
      'Sharpness': lambda: _sharpness(image, factor),
      'ShearX': lambda: self._move('ShearX', image, draw),
      'ShearY': lambda: self._move('ShearY', image, draw),
      'TranslateX': lambda: _translate(image, signed(self._shift), axis=1),
      'TranslateY': lambda: _translate(image, signed(self._shift), axis=0),
      'Cutout': lambda: _cutout(image, 4 * magnitude, draw[1:]),
      'SolarizeAdd': lambda: _solarize_add(image, int(11 * magnitude)),
    }
    # Blending with factor 1 gives exactly the image.
    if factor == 1 and name in ('Color', 'Contrast', 'Brightness', 'Sharpness'):
      return tf.identity(image)
    return operations[name]()

  def _move(self, name: str, image: tf.Tensor, draw: tf.Tensor) -> tf.Tensor:
    """Gather every pixel from its source; the last source is the fill value."""
    pixels = tf.reshape(image, [-1, _CHANNELS])
    fill = tf.fill([1, _CHANNELS], tf.constant(_FILL, tf.uint8))
    sign = tf.cast(draw[0] >= 0.5, tf.int32)
    source = tf.constant(self._sources[name])[sign]
    moved = tf.gather_nd(tf.concat([pixels, fill], axis=0), source[:, None])
    return tf.reshape(moved, image.shape)


class RandAugment:
  """Random operations, one per layer, on a uint8 image `[size, size, 3]`.

  Args:
    size: height and width in pixels.
    layers: number of operations.
    magnitude: strength of all operations, 0 to 30; published are 5, 10 and 15.

  Examples:
    >>> augment = RandAugment(size=32, layers=4, magnitude=5)
    >>> image = tf.zeros((32, 32, 3), tf.uint8)
    >>> augment(image, seed=tf.constant([0, 1])).shape
    TensorShape([32, 32, 3])
  """

  def __init__(self, size: int, layers: int, magnitude: int):
    self._layers = layers
    operations = Operations(size, magnitude)
    self._branches = [
      as_branch(functools.partial(operations.apply, name))
      for name in OPERATIONS
    ]

  def __call__(self, image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Augment an image; the result is a function of `seed` (two integers)."""
    draws = tf.random.stateless_uniform([self._layers, 4], seed)
    for draw in tf.unstack(draws):
      image = apply_one(self._branches, draw[0], image, draw[1:])
    return image


def as_branch(function: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
  """Return a function that graphs do not inline: its nodes would cost time."""
  return tf.function(
    function, autograph=False, experimental_attributes={'_noinline': True}
  )


def apply_one(
  branches: Sequence[Callable[..., tf.Tensor]],
  draw: tf.Tensor,
  image: tf.Tensor,
  *args: tf.Tensor,
) -> tf.Tensor:
  """Apply the branch that a number in [0, 1) chooses to a uint8 image."""
  augmented = tf.switch_case(
    tf.cast(draw * len(branches), tf.int32),
    [functools.partial(branch, image, *args) for branch in branches],
  )
  return tf.ensure_shape(augmented, image.shape)


def _source_pixels(size: int, magnitude: int) -> dict[str, np.ndarray]:
  """Return each pixel's source by operation, for both signs: `[2, size^2]`.

  TensorFlow's projective transform (nearest neighbour) is applied once, to an
  image of indices.
  """
  angle, shear = math.radians(3 * magnitude), 0.03 * magnitude
  transforms = {
    'Rotate': [_rotation(size, sign * angle) for sign in (-1, 1)],
    'ShearX': [[1, sign * shear, 0, 0, 1, 0, 0, 0] for sign in (-1, 1)],
    'ShearY': [[1, 0, 0, sign * shear, 1, 0, 0, 0] for sign in (-1, 1)],
  }
  indices = np.arange(size * size, dtype=np.int32).reshape(1, size, size, 1)
  with tf.init_scope():
    return {
      name: tf.raw_ops.ImageProjectiveTransformV3(
        images=np.repeat(indices, 2, axis=0),
        transforms=tf.constant(pair, tf.float32),
        output_shape=[size, size],
        fill_value=float(size * size),
        interpolation='NEAREST',
        fill_mode='CONSTANT',
      )
      .numpy()
      .reshape(2, -1)
      for name, pair in transforms.items()
    }


def _rotation(size: int, angle: float) -> list[float]:
  """Return the projective transform that rotates about the centre."""
  cos, sin, last = math.cos(angle), math.sin(angle), size - 1
  x_offset = (last - (cos - sin) * last) / 2
  y_offset = (last - (sin + cos) * last) / 2
  return [cos, -sin, x_offset, sin, cos, y_offset, 0, 0]


def _auto_contrast(image: tf.Tensor) -> tf.Tensor:
  """Stretch each channel to 0..255; a constant one stays unchanged."""
  pixels = tf.reshape(image, [-1, _CHANNELS])
  low = _to_float(tf.reduce_min(pixels, axis=0))
  high = _to_float(tf.reduce_max(pixels, axis=0))
  flat = high <= low
  scale = 255 / tf.where(flat, 255.0, high - low)
  offset = tf.where(flat, 0.0, -low * scale)
  stretched = _rows(_to_float(image)) * _by_column(image, scale)
  return _to_uint8(stretched + _by_column(image, offset), image)


def _equalize(image: tf.Tensor) -> tf.Tensor:
  """Equalize each channel's histogram."""
  first_bin = _by_column(image, tf.constant([0, 256, 512]))
  bins = _rows(tf.cast(image, tf.int32)) + first_bin
  counts = tf.math.bincount(bins, minlength=768, maxlength=768)
  counts = tf.reshape(counts, [_CHANNELS, 256])
  occupied = tf.range(256) * tf.cast(counts > 0, tf.int32)
  highest = tf.argmax(occupied, axis=1)
  in_highest = tf.gather(counts, highest, batch_dims=1)
  step = (tf.reduce_sum(counts, axis=1) - in_highest)[:, None] // 255
  below = tf.cumsum(counts, axis=1, exclusive=True)
  table = (below + step // 2) // tf.maximum(step, 1)
  table = tf.where(step == 0, tf.range(256), tf.minimum(table, 255))
  table = tf.cast(tf.reshape(table, [-1]), tf.uint8)
  return tf.reshape(tf.gather_nd(table, bins[..., None]), image.shape)


def _posterize(image: tf.Tensor, bits: int) -> tf.Tensor:
  """Keep the highest bits of each value."""
  mask = 256 - 2 ** (8 - min(bits, 8))
  return tf.bitwise.bitwise_and(image, tf.constant(mask, tf.uint8))


def _solarize(image: tf.Tensor, threshold: int) -> tf.Tensor:
  """Invert the values at or above the threshold."""
  inverted = tf.cast(image >= tf.constant(threshold, tf.uint8), tf.uint8) * 255
  return tf.bitwise.bitwise_xor(image, inverted)


def _solarize_add(image: tf.Tensor, addition: int) -> tf.Tensor:
  """Add to the values below 128, up to 255."""
  dark = tf.cast(image < tf.constant(128, tf.uint8), tf.uint8)
  if addition < 128:
    return image + dark * tf.constant(addition, tf.uint8)
  addition = tf.constant(min(addition, 255), tf.uint8)
  return image + dark * tf.minimum(addition, 255 - image)


def _color(image: tf.Tensor, factor: float) -> tf.Tensor:
  """Blend with the grey image, by the luma weights of ITU-R 601."""
  grey = tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(image))
  return _blend(_to_float(grey), _to_float(image), factor)


def _contrast(image: tf.Tensor, factor: float) -> tf.Tensor:
  """Blend with a constant: the number of pixels over 256, at most 255."""
  constant = min(image.shape[0] * image.shape[1] // 256, 255)
  return _blend(float(constant), _to_float(image), factor)


def _sharpness(image: tf.Tensor, factor: float) -> tf.Tensor:
  """Blend with a smoothed image; the border of one pixel stays unchanged.

  The 3x3 kernel is 1/13 everywhere except 5/13 at its centre.
  """
  pixels = _rows(_to_float(image))
  columns = pixels[:-2] + pixels[1:-1] + pixels[2:]
  step = _CHANNELS
  sums = columns[:, : -2 * step] + columns[:, step:-step]
  sums += columns[:, 2 * step :]
  inner = pixels[1:-1, step:-step]
  # Sums are integers, so they are exact before the division.
  smoothed = tf.floor((sums + 4 * inner) / 13)
  blended = _rows(_blend(smoothed, inner, factor))
  rows = _rows(image)
  middle = rows[1:-1]
  middle = tf.concat([middle[:, :step], blended, middle[:, -step:]], axis=1)
  whole = tf.concat([rows[:1], middle, rows[-1:]], axis=0)
  return tf.reshape(whole, image.shape)


def _translate(image: tf.Tensor, pixels: tf.Tensor, axis: int) -> tf.Tensor:
  """Translate the image along an axis, by at most its size."""
  rows = _rows(image)
  steps = pixels * (_CHANNELS if axis == 1 else 1)
  after = tf.clip_by_value(steps, 0, rows.shape[axis])
  before = tf.clip_by_value(-steps, 0, rows.shape[axis])
  if axis == 1:
    kept = rows[:, after : rows.shape[1] - before]
    paddings = [[0, 0], [before, after]]
  else:
    kept = rows[after : rows.shape[0] - before]
    paddings = [[before, after], [0, 0]]
  moved = tf.pad(kept, paddings, constant_values=_FILL)
  return tf.reshape(moved, image.shape)


def _cutout(image: tf.Tensor, half: int, centre: tf.Tensor) -> tf.Tensor:
  """Fill the square of side `2 * half` at a centre, cut at the border."""
  size = image.shape[0]
  centre = tf.cast(centre * size, tf.int32)
  top, left = tf.unstack(tf.maximum(centre - half, 0))
  bottom, right = tf.unstack(tf.minimum(centre + half, size))
  hole = tf.fill(
    [bottom - top, right - left, _CHANNELS], tf.constant(_FILL, tf.uint8)
  )
  return paste(hole, image, top, left)


def paste(
  patch: tf.Tensor, image: tf.Tensor, top: tf.Tensor, left: tf.Tensor
) -> tf.Tensor:
  """Paste `patch [h, w, 3]` into `image [H, W, 3]`."""
  bottom, right = top + tf.shape(patch)[0], left + tf.shape(patch)[1]
  middle = image[top:bottom]
  middle = tf.concat([middle[:, :left], patch, middle[:, right:]], axis=1)
  whole = tf.concat([image[:top], middle, image[bottom:]], axis=0)
  return tf.ensure_shape(whole, image.shape)


def _blend(
  other: tf.Tensor | float, image: tf.Tensor, factor: float
) -> tf.Tensor:
  """Interpolate (extrapolate beyond 1) from `other` to `image`."""
  mixed = other + factor * (image - other)
  return _to_uint8(mixed, image)


def _rows(image: tf.Tensor) -> tf.Tensor:
  """Reshape `[H, W, 3]` to `[H, 3 W]`: broadcasting over 3 values is slow."""
  return tf.reshape(image, [image.shape[0], -1])


def _by_column(image: tf.Tensor, by_channel: tf.Tensor) -> tf.Tensor:
  return tf.tile(by_channel, [image.shape[1]])


def _to_float(image: tf.Tensor) -> tf.Tensor:
  return tf.cast(image, tf.float32)


def _to_uint8(values: tf.Tensor, image: tf.Tensor) -> tf.Tensor:
  """Clip and truncate values, and reshape them to the shape of `image`."""
  clipped = tf.raw_ops.ClipByValue(
    t=values, clip_value_min=0.0, clip_value_max=255.0
  )
  return tf.reshape(tf.cast(clipped, tf.uint8), image.shape)
