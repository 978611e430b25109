"""NFNet's stem, rearranged for matrix units of 128 lanes.

The stem's feature maps have many pixels and few channels, so that most lanes of
a TPU are idle. Here the pixels of square blocks lie side by side on the channel
axis (space to depth, in the order row, column, channel), and a 3x3 convolution
becomes a convolution over blocks: its kernel holds the published kernel once
for each pixel of an output block, and zeros elsewhere. Values and gradients are
those of the plain stem, summed in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from nfnet_jax.models import layers

# Side of the blocks of an image, in pixels.
BLOCK = 4
_IMAGE_CHANNELS = 3
# For each convolution: the side of its output blocks in pixels, and the number
# of parts in which their rows are computed. A part of one row needs two rows of
# input blocks, while both rows together need three, but it fills half as many
# lanes. This pays for the third convolution, of which half fills 128 lanes in
# NFNets, and not for the second.
_LAYOUT = ((2, 1), (2, 1), (2, 2), (1, 1))


def fits(images: jax.Array) -> bool:
  """Return whether images are blocks, or have sides that blocks divide."""
  height, width = images.shape[1:3]
  return _is_blocked(images) or height % BLOCK == width % BLOCK == 0


def to_blocks(images: jax.Array) -> jax.Array:
  """Rearrange `[N, H, W, C]` to `[N, H / 4, W / 4, 16 C]`.

  The order of the last axis is row, column, channel.

  Examples:
    >>> to_blocks(jnp.zeros((2, 32, 64, 3))).shape
    (2, 8, 16, 48)
  """
  count, height, width, channels = images.shape
  rows, columns = height // BLOCK, width // BLOCK
  shape = (count, rows, BLOCK, columns, BLOCK, channels)
  pixels = jnp.swapaxes(images.reshape(shape), 2, 3)
  return pixels.reshape(count, rows, columns, BLOCK**2 * channels)


def stem(
  images: jax.Array,
  convs: Sequence[layers.ScaledWSConv2D],
  activation: layers.Activation,
) -> jax.Array:
  """Compute the plain stem of `nfnet.NFNet` with the same parameters.

  Args:
    images: `[N, H, W, 3]`, or the result of `to_blocks`; see `fits`.
    convs: the four convolutions, of strides 2, 1, 1 and 2.
    activation: activation between the convolutions.

  Returns:
    `[N, H / 4, W / 4, C]`.
  """
  x = images if _is_blocked(images) else to_blocks(images)
  channels = _IMAGE_CHANNELS
  for index, (conv, (side, parts)) in enumerate(zip(convs, _LAYOUT)):
    kernel, bias = conv.parameters(channels, x.dtype)
    x = activation(x) if index else x
    x = _convolve(x, kernel, conv.stride, side, parts)
    # Added to all parts at once, so that one pass sums its gradient.
    x += jnp.tile(bias, side**2)
    channels = conv.output_channels
  return x


def _is_blocked(images: jax.Array) -> bool:
  return images.shape[-1] == BLOCK**2 * _IMAGE_CHANNELS


class _Axis(NamedTuple):
  """The input blocks that some pixels of an output block see along an axis.

  Attributes:
    before: blocks before the one at the same position.
    after: blocks after it.
    starts: offset of each pixel's kernel in these blocks, in pixels.
  """

  before: int
  after: int
  starts: tuple[int, ...]


def _axis(pixels: Sequence[int], stride: int, side: int) -> _Axis:
  # SAME padding of even sizes: one pixel on both sides, or only at the end.
  firsts = [stride * pixel - (2 - stride) for pixel in pixels]
  before, after = -(firsts[0] // side), (firsts[-1] + 2) // side
  return _Axis(before, after, tuple(first + before * side for first in firsts))


def _convolve(
  x: jax.Array, kernel: jax.Array, stride: int, side: int, parts: int
) -> jax.Array:
  """Convolve blocks of `stride * side` pixels to blocks of `side`."""
  pixels, rows_per_part = range(side), side // parts
  columns = _axis(pixels, stride, stride * side)
  outputs = []
  for part in range(parts):
    start = part * rows_per_part
    rows = _axis(pixels[start : start + rows_per_part], stride, stride * side)
    outputs.append(
      lax.conv_general_dilated(
        x,
        _block_kernel(kernel, stride * side, rows, columns),
        window_strides=(1, 1),
        padding=[(axis.before, axis.after) for axis in (rows, columns)],
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      )
    )
  return jnp.concatenate(outputs, -1)


def _block_kernel(
  kernel: jax.Array, side: int, rows: _Axis, columns: _Axis
) -> jax.Array:
  """Expand the kernel `[3, 3, I, O]` to a kernel over blocks.

  Returns:
    `[blocks, blocks, side * side * I, output pixels * O]`.
  """
  height, width = ((a.before + 1 + a.after) * side for a in (rows, columns))
  taps, _, inputs, _ = kernel.shape

  def placed(top: int, left: int) -> jax.Array:
    return jnp.pad(
      kernel,
      (
        (top, height - taps - top),
        (left, width - taps - left),
        (0, 0),
        (0, 0),
      ),
    )

  pixels = jnp.concatenate(
    [placed(top, left) for top in rows.starts for left in columns.starts], -1
  )
  shape = (height // side, side, width // side, side, inputs, -1)
  blocks = jnp.swapaxes(pixels.reshape(shape), 1, 2)
  return blocks.reshape(height // side, width // side, side**2 * inputs, -1)
