"""NFNet's blocks, GELU and weight standardisation in fewer passes over memory.

They compute `nfnet.NFBlock`, `layers.scaled_activation` and
`layers.standardize` with the same parameters, and are tested against them. Only
roundings and the order of sums differ.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
from jax import lax
import jax.numpy as jnp

from nfnet_jax.models import layers, normalizer_free

if TYPE_CHECKING:
  from nfnet_jax.models import nfnet


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """Compute GELU's tanh approximation; the backward pass keeps only `x`.

  The backward pass of `jax.nn.gelu` also keeps the hyperbolic tangent, one more
  array of the activation's size.
  """
  return jax.nn.gelu(x)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  return gelu(x), x


def _gelu_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
  # gelu(x) = x sigmoid(2 u). If this used the tanh of the forward pass, the
  # compiler would keep the tanh in memory.
  root = (8 / jnp.pi) ** 0.5
  gate = jax.nn.sigmoid(root * (x + 0.044715 * x**3))
  slope = root * (1 + 3 * 0.044715 * x**2)
  return (dy * gate * (1 + x * slope * (1 - gate)),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def scaled_gelu(x: jax.Array) -> jax.Array:
  """Compute `layers.scaled_activation('gelu')`."""
  return gelu(x) * layers.ACTIVATIONS['gelu'][1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def standardize(w: jax.Array, gain: jax.Array, eps: float = 1e-4) -> jax.Array:
  """Compute `layers.standardize`, in float32 for all dtypes.

  Its gradient takes two passes: one for two sums per unit, one for the result.
  """
  return _standardize_forward(w, gain, eps)[0]


@jax.named_scope('standardize')
def _standardize_forward(
  w: jax.Array, gain: jax.Array, eps: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  axes = tuple(range(w.ndim - 1))
  wide = w.astype(jnp.float32)
  mean = jnp.mean(wide, axes)
  norm = jnp.sum(jnp.square(wide - mean), axes)
  scale = lax.rsqrt(jnp.maximum(norm, eps))
  kernel = (wide - mean) * (scale * gain.astype(jnp.float32))
  return kernel.astype(w.dtype), (w, gain, mean, scale, norm > eps)


@jax.named_scope('standardize')
def _standardize_backward(
  eps: float, kept: tuple[jax.Array, ...], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
  del eps
  w, gain, mean, scale, is_above = kept
  axes = tuple(range(w.ndim - 1))
  dy = dy.astype(jnp.float32)
  unit = (w.astype(jnp.float32) - mean) * scale
  along = jnp.sum(dy * unit, axes)
  dw = dy - jnp.mean(dy, axes) - unit * jnp.where(is_above, along, 0)
  dw *= gain.astype(jnp.float32) * scale
  return dw.astype(w.dtype), along.astype(gain.dtype)


standardize.defvjp(_standardize_forward, _standardize_backward)


def run_block(
  block: nfnet.NFBlock,
  x: jax.Array,
  key: jax.Array | None,
  positions: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Compute a call of `nfnet.NFBlock`; see `residual.ResidualBlock`.

  Between the last convolution and the block's output are a bias, a mean over
  pixels, gates, dropped examples, a gain and the shortcut with its bias. All of
  these are one scale and one shift per example and channel. Their gradients are
  two sums over pixels, computed in one pass.
  """
  out = block.preactivate(x, key is not None)
  shortcut: jax.Array = x
  shortcut_bias: jax.Array | int = 0
  if block.is_transition:
    pooled = normalizer_free.downsample(out, block.stride)
    shortcut, shortcut_bias = _convolve(block.conv_shortcut, pooled)
  out, bias = _convolve(block.convs[0], out)
  shape, groups = out.shape, block.convs[1].groups
  if groups > 1:
    out = out.reshape(*shape[:-1], groups, -1)
    bias = bias.reshape(groups, -1)
  out = block.activation(out + bias).reshape(shape)
  for conv in block.convs[1:-1]:
    out = block.activation(conv(out))
  out, bias = _convolve(block.convs[-1], out)

  gates = 2 * block.squeeze_excite.gates(jnp.mean(out, axis=(1, 2)) + bias)
  residual_var = layers.signal_statistics(_each(gates) * (out + bias))['var']
  scale = block.alpha * block.gain(out.dtype) * gates
  if block.stochdepth_rate and key is not None:
    kept = layers.survivors(block.stochdepth_rate, key, positions)
    scale *= kept[:, None].astype(out.dtype)
  # The barrier separates the sums over pixels (the gradient of the shift) from
  # those over examples (the gradient of the biases).
  shift = lax.optimization_barrier(scale * bias + shortcut_bias)
  return _each(scale) * out + _each(shift) + shortcut, residual_var


def _convolve(
  conv: layers.ScaledWSConv2D, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Return the convolution's output without its bias, and the bias."""
  kernel, bias = conv.parameters(x.shape[-1], x.dtype)
  return conv.convolve(x, kernel), bias


def _each(values: jax.Array) -> jax.Array:
  """Expand `[N, C]` to broadcast against `[N, H, W, C]`."""
  return values[:, None, None, :]
