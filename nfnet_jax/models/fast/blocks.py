"""Forms of NFNet's parts that take fewer passes over memory.

They compute what `nfnet.NFBlock`, `layers.scaled_activation` and
`layers.standardize` say, which they are tested against, with the same
parameters; only roundings and the order of sums differ.
"""

import functools

import haiku as hk
import jax
from jax import lax
import jax.numpy as jnp

from nfnet_jax.models import layers, normalizer_free


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """Computes GELU's tanh approximation; its derivative from `x` alone.

  JAX's own keeps the hyperbolic tangent for the backward pass, one more array
  of the activation's size.
  """
  return jax.nn.gelu(x)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  return gelu(x), x


def _gelu_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
  # gelu(x) = x sigmoid(2 u), and no tanh that the forward pass has as well:
  # the compiler would keep that one.
  root = (8 / jnp.pi) ** 0.5
  gate = jax.nn.sigmoid(root * (x + 0.044715 * x**3))
  slope = root * (1 + 3 * 0.044715 * x**2)
  return (dy * gate * (1 + x * slope * (1 - gate)),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def scaled_gelu(x: jax.Array) -> jax.Array:
  """Computes `layers.scaled_activation('gelu')`."""
  return gelu(x) * layers.ACTIVATIONS['gelu'][1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def standardize(w: jax.Array, gain: jax.Array, eps: float = 1e-4) -> jax.Array:
  """Does what `layers.standardize` does, in float32 whatever the dtype.

  Its gradient takes one pass for two sums a unit, and one more.
  """
  return _standardize_forward(w, gain, eps)[0]


@jax.named_scope('standardize')
def _standardize_forward(w: jax.Array, gain: jax.Array, eps: float):
  axes = tuple(range(w.ndim - 1))
  wide = w.astype(jnp.float32)
  mean = jnp.mean(wide, axes)
  norm = jnp.sum(jnp.square(wide - mean), axes)
  scale = lax.rsqrt(jnp.maximum(norm, eps))
  kernel = (wide - mean) * (scale * gain.astype(jnp.float32))
  return kernel.astype(w.dtype), (w, gain, mean, scale, norm > eps)


@jax.named_scope('standardize')
def _standardize_backward(eps: float, kept, dy: jax.Array):
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
  block: hk.Module, x: jax.Array, key: jax.Array | None, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Does what calling an `nfnet.NFBlock` does.

  Between the last convolution and the block's output stand a bias, a mean over
  pixels, gates, dropped examples, a gain and the shortcut with its bias. All of
  that is one scale and one shift an example and channel, so that its gradients
  are two sums over pixels, taken in one pass.
  """
  out = block.activation(x) * block.beta
  shortcut, shift = x, 0
  if block.is_transition:
    pooled = normalizer_free.downsample(out, block.stride)
    shortcut, shift = _convolve(block.conv_shortcut, pooled)
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
  # The barrier keeps the sums over pixels, which are the gradient of the shift,
  # apart from those over examples, which are that of the biases.
  shift = lax.optimization_barrier(scale * bias + shift)
  return _each(scale) * out + _each(shift) + shortcut, residual_var


def _convolve(
  conv: layers.ScaledWSConv2D, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns what the convolution gives, without its bias, and the bias."""
  kernel, bias = conv.parameters(x.shape[-1], x.dtype)
  return conv.convolve(x, kernel), bias


def _each(values: jax.Array) -> jax.Array:
  """Makes `[N, C]` fit `[N, H, W, C]`."""
  return values[:, None, None, :]
