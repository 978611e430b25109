"""Batch normalisation, and the layers around it in the families that use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from nfnet_jax.models import layers, residual
from nfnet_jax.models.fast import convolutions

# The mapped axis over whose devices batch statistics are shared.
REPLICA_AXIS = 'batch'


class BatchNorm(hk.BatchNorm):
  """Batch normalisation of `[N, H, W, C]` over all axes but the last.

  Parameters: `scale` and `offset [1, 1, 1, C]`. State: `mean_ema` and
  `var_ema`, each `counter []`, `hidden` and `average [1, 1, 1, C]`. The
  averages are bias-corrected and hold mean 0 and variance 1 before the first
  training step, whether the model is initialised in training or in evaluation.

  Deviation: statistics and normalisation are computed in float32 or wider. In
  bfloat16 a decay of 0.999 rounds to 1, and E[x^2] - E[x]^2 loses all digits.
  """

  def __init__(
    self,
    decay_rate: float = 0.9,
    eps: float = 1e-5,
    cross_replica_bn: bool = False,
    name: str | None = None,
  ):
    """Create the running averages.

    Args:
      decay_rate: decay of the running averages.
      eps: added to the variance.
      cross_replica_bn: whether the devices of the mapped axis `REPLICA_AXIS`
        share batch statistics in training. Otherwise each uses its own.
      name: module name.
    """
    super().__init__(
      create_scale=True,
      create_offset=True,
      decay_rate=decay_rate,
      eps=eps,
      cross_replica_axis=REPLICA_AXIS if cross_replica_bn else None,
      name=name,
    )

  @jax.named_scope('batch_norm')
  def __call__(  # type: ignore[override]  # Without Haiku's further options.
    self, x: jax.Array, is_training: bool
  ) -> jax.Array:
    """Normalise by the batch's statistics or by the running averages."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if hk.running_init():
      # Haiku keeps the first value set as the initial one.
      ones = jnp.ones((1,) * (x.ndim - 1) + x.shape[-1:], dtype)
      self.mean_ema(jnp.zeros_like(ones))
      self.var_ema(ones)
    return super().__call__(x.astype(dtype), is_training).astype(x.dtype)


# Creates a `BatchNorm` with a given name.
NormFactory = Callable[..., BatchNorm]
# Creates a convolution, with the arguments of `conv`.
ConvFactory = Callable[..., hk.Conv2D]


def conv(
  channels: int,
  kernel_size: int,
  stride: int = 1,
  groups: int = 1,
  fast: bool = False,
  **options: Any,
) -> hk.Conv2D:
  """Return a convolution without bias, SAME padding, He initialisation.

  Args:
    channels: output channels.
    kernel_size: pixels a side.
    stride: pixels between windows, in both directions.
    groups: channel groups.
    fast: whether `models.fast.convolutions` computes it.
    **options: passed to `hk.Conv2D`, such as `name` or `w_init`.
  """
  init = hk.initializers.VarianceScaling(2.0, 'fan_in', 'normal')
  return (convolutions.Conv2D if fast else hk.Conv2D)(
    channels,
    kernel_size,
    stride,
    feature_group_count=groups,
    with_bias=False,
    **{'w_init': init, **options},
  )


class PreActivationBlock(residual.ResidualBlock):
  """The residual block `shortcut + branch` of normalised convolutions.

  The branch is a chain of normalisation, activation and convolution, and may
  end in squeeze-excite. The projected shortcut is computed from the first
  activation's output. A family's constructor sets the attributes; the family
  defines `project`.

  Attributes:
    activation: between normalisation and convolution.
    norms: one per convolution.
    convs: the branch's convolutions.
    squeeze_excite: gates of the branch's output, or None.
  """

  activation: layers.Activation
  norms: Sequence[BatchNorm]
  convs: Sequence[hk.Conv2D]
  squeeze_excite: layers.SqueezeExcite | None

  def preactivate(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Normalise the input and apply the activation."""
    return self.activation(self.norms[0](x, is_training))

  def branch(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Apply the convolutions, normalising between them, and squeeze-excite."""
    x = self.convs[0](x)
    for norm, conv in zip(self.norms[1:], self.convs[1:]):
      x = conv(self.activation(norm(x, is_training)))
    if self.squeeze_excite is not None:
      x = self.squeeze_excite(x) * x
    return x
