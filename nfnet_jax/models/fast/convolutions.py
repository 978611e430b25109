"""Convolutions in a form that is fast on CPUs.

XLA for CPUs computes the gradient with respect to a grouped kernel at a
fraction of the speed of plain kernels, and 1x1 convolutions slower than matrix
products. Here each group is a separate convolution. Depthwise convolutions are
sums of shifted images, which XLA computes in one pass. Values and gradients
differ from those of `layers.convolve` only in the order of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools

import haiku as hk
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from nfnet_jax.models import layers


def convolve(
  x: jax.Array,
  kernel: jax.Array | Sequence[jax.Array],
  stride: int,
  groups: int,
  symmetric: bool = False,
) -> jax.Array:
  """Compute `layers.convolve`.

  Args:
    x: `[N, H, W, I]`.
    kernel: `[H, W, I / groups, O]`, or the result of `split_kernel`.
    stride: see `layers.convolve`.
    groups: see `layers.convolve`.
    symmetric: see `layers.convolve`.

  Examples:
    >>> x, kernel = jnp.ones((1, 4, 4, 6)), jnp.ones((3, 3, 2, 9))
    >>> convolve(x, kernel, stride=2, groups=3).shape
    (1, 2, 2, 9)
  """
  if groups > 1 and not isinstance(kernel, Sequence):
    kernel = split_kernel(kernel, groups)
  if isinstance(kernel, Sequence):
    parts = zip(jnp.split(x, groups, -1), kernel, strict=True)
    return jnp.concatenate(
      [convolve(*part, stride, 1, symmetric) for part in parts], -1
    )
  if groups > 1:
    return _convolve_depthwise(x, kernel, stride, symmetric)
  if kernel.shape[:2] == (1, 1) and stride == 1:
    return x @ kernel[0, 0]
  return layers.convolve(x, kernel, stride, groups, symmetric)


def split_kernel(kernel: jax.Array, groups: int) -> jax.Array | list[jax.Array]:
  """Return the kernel of each group; a kernel that is not split, unchanged.

  `convolve` copies the kernels of the groups in each call unless it is given
  the result.
  """
  is_depthwise = kernel.shape[2] == 1 and kernel.shape[3] == groups
  if groups == 1 or is_depthwise:
    return kernel
  return jnp.split(kernel, groups, -1)


class Conv2D(hk.Conv2D):
  """`hk.Conv2D` of images `[N, H, W, C]` with SAME padding, as `convolve`."""

  # Without the option `precision` of Haiku's.
  def __call__(self, inputs: jax.Array) -> jax.Array:  # type: ignore[override]
    """Convolve, and add the bias if there is one."""
    groups, units = self.feature_group_count, self.output_channels
    shape = (*self.kernel_shape, inputs.shape[-1] // groups, units)
    kernel = hk.get_parameter('w', shape, inputs.dtype, init=self.w_init)
    outputs = convolve(inputs, kernel, self.stride[0], groups)
    if self.with_bias:
      outputs += hk.get_parameter('b', (units,), inputs.dtype, init=self.b_init)
    return outputs


def _convolve_depthwise(
  x: jax.Array, kernel: jax.Array, stride: int, symmetric: bool
) -> jax.Array:
  # The kernel's gradient is a sum over all pixels; bfloat16 would lose most.
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  x, kernel, narrow = x.astype(dtype), kernel.astype(dtype), x.dtype
  sides, sizes = x.shape[1:3], kernel.shape[:2]
  padding = [(size // 2, size // 2) for size in sizes]
  if not symmetric:
    padding = lax.padtype_to_pads(sides, sizes, (stride, stride), 'SAME')
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  # Positions of the kernel at stride 1.
  rows, columns = (side - size + 1 for side, size in zip(x.shape[1:3], sizes))
  terms = [
    x[:, i : i + rows : stride, j : j + columns : stride] * kernel[i, j, 0]
    for i, j in np.ndindex(*sizes)
  ]
  return functools.reduce(jnp.add, terms).astype(narrow)
