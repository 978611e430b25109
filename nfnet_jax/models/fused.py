"""Forms of NFNet's block that take fewer passes over its activations.

They compute what `nfnet.NFBlock` and `layers.scaled_activation` say, which they
are tested against, with the same parameters; only the order of the sums
differs.
"""

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
