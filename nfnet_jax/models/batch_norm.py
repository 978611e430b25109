"""Batch normalisation, and what goes with it in the families that use it."""

from collections.abc import Callable, Sequence

import haiku as hk
import jax
import jax.numpy as jnp

from nfnet_jax.models import layers


class BatchNorm(hk.BatchNorm):
  """Batch normalisation of `[N, H, W, C]` over all axes but the last.

  Parameters: `scale` and `offset [1, 1, 1, C]`. State: `mean_ema` and
  `var_ema`, each `counter []`, `hidden` and `average [1, 1, 1, C]`; the
  averages are free of bias and hold mean 0 and variance 1 before the first
  training step, whichever way the model is initialised.

  Deviation: statistics and normalisation are computed in float32 or wider. In
  bfloat16 a decay of 0.999 rounds to 1, and E[x^2] - E[x]^2 to anything.
  """

  def __init__(
    self,
    decay_rate: float = 0.9,
    eps: float = 1e-5,
    cross_replica_axis: str | None = None,
    name: str | None = None,
  ):
    """Builds the averages.

    Args:
      decay_rate: of the running averages.
      eps: added to the variance.
      cross_replica_axis: name of the mapped axis over whose devices training
        shares batch statistics; None takes each device's own.
      name: module name.
    """
    super().__init__(
      create_scale=True,
      create_offset=True,
      decay_rate=decay_rate,
      eps=eps,
      cross_replica_axis=cross_replica_axis,
      name=name,
    )

  @jax.named_scope('batch_norm')
  def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if hk.running_init():
      # Haiku keeps the first value set as the initial one.
      ones = jnp.ones((1,) * (x.ndim - 1) + x.shape[-1:], dtype)
      self.mean_ema(jnp.zeros_like(ones))
      self.var_ema(ones)
    return super().__call__(x.astype(dtype), is_training).astype(x.dtype)


# Makes a `BatchNorm` of a given name.
NormFactory = Callable[..., BatchNorm]


def conv(
  channels: int, kernel_size: int, stride: int = 1, groups: int = 1, **options
) -> hk.Conv2D:
  """Returns a convolution without bias, SAME padding, He initialisation.

  Args:
    channels: output channels.
    kernel_size: pixels a side.
    stride: in both directions.
    groups: of channels.
    **options: passed to `hk.Conv2D`, such as `name` or `w_init`.
  """
  init = hk.initializers.VarianceScaling(2.0, 'fan_in', 'normal')
  return hk.Conv2D(
    channels,
    kernel_size,
    stride,
    feature_group_count=groups,
    with_bias=False,
    **{'w_init': init, **options},
  )


class PreActivationBlock(hk.Module):
  """The residual block `shortcut + branch` of normalised convolutions.

  The branch is a chain of normalisation, activation and convolution, and may
  end in squeeze-excite. The projected shortcut sees the first activation's
  output, a plain shortcut sees `x`.

  A family's constructor sets the attributes; the family defines `project`.

  Attributes:
    is_transition: whether the shortcut is projected.
    activation: between normalisation and convolution.
    stochdepth_rate: probability of dropping the branch in training.
    norms: one a convolution.
    convs: of the branch.
    squeeze_excite: gates of the branch's output, or None.
  """

  is_transition: bool
  activation: layers.Activation
  stochdepth_rate: float
  norms: Sequence[BatchNorm]
  convs: Sequence[hk.Conv2D]
  squeeze_excite: layers.SqueezeExcite | None

  def project(self, x: jax.Array) -> jax.Array:
    """Maps the activated input to the shortcut of a transition block."""
    raise NotImplementedError

  def __call__(
    self, x: jax.Array, key: jax.Array | None, positions: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the block's output and the branch's average channel variance.

    Args:
      x: `[N, H, W, C]`.
      key: random key of this block and step; None in evaluation, which takes
        the running statistics.
      positions: `[N]`, see `layers.example_keys`.
    """
    is_training = key is not None
    out = self.activation(self.norms[0](x, is_training))
    shortcut = self.project(out) if self.is_transition else x
    out = self.convs[0](out)
    for norm, conv in zip(self.norms[1:], self.convs[1:]):
      out = conv(self.activation(norm(out, is_training)))
    if self.squeeze_excite is not None:
      out = self.squeeze_excite(out) * out
    residual_var = layers.signal_statistics(out)['var']
    out = layers.stochastic_depth(out, self.stochdepth_rate, key, positions)
    return out + shortcut, residual_var
