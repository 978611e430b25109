"""The residual block that the normalizer-free families share.

Brock et al., "Characterizing signal propagation to close the performance gap in
unnormalized ResNets" (arXiv 2101.08692), section 4, and arXiv 2102.06171,
section 2.
"""

from collections.abc import Sequence
import math

import haiku as hk
import jax
import jax.numpy as jnp

from nfnet_jax.models import layers


def betas(depth: Sequence[int], alpha: float) -> list[float]:
  """Returns 1 / the standard deviation expected at each block's input.

  Every block adds `alpha ** 2` to the variance; a stage's first block starts
  again from 1, because its shortcut sees the input divided by its deviation.

  Args:
    depth: blocks of each stage.
    alpha: weight of each residual branch.

  Example:
    >>> [round(beta ** -2, 2) for beta in betas((1, 2, 2), alpha=0.2)]
    [1.0, 1.04, 1.04, 1.08, 1.04]
  """
  result, variance = [], 1.0
  for blocks in depth:
    for index in range(blocks):
      result.append(1 / math.sqrt(variance))
      variance = (1.0 if index == 0 else variance) + alpha**2
  return result


class NormalizerFreeBlock(hk.Module):
  """The residual block `shortcut + alpha * skip_gain * branch`.

  Branch and projected shortcut see `activation(x) * beta`, a plain shortcut
  sees `x`. The paper writes f(x / std); the released code computes f(x) / std,
  which differs for GELU and SiLU. A family defines `branch`, and `project` for
  the first block of a stage.
  """

  def __init__(
    self,
    *,
    is_transition: bool,
    activation: layers.Activation,
    alpha: float,
    beta: float,
    stochdepth_rate: float,
    skip_gain: float = 0.0,
    name: str | None = None,
  ):
    """Takes what the families share.

    Args:
      is_transition: whether the shortcut is projected.
      activation: gamma-scaled; see `layers.scaled_activation`.
      alpha: weight of the branch.
      beta: see `betas`.
      stochdepth_rate: probability of dropping the branch in training.
      skip_gain: initial value of the branch's learnt gain; the analysis of the
        signal's variance holds at initialisation for 1 only.
      name: module name.
    """
    super().__init__(name=name)
    self.is_transition = is_transition
    self.activation = activation
    self.alpha = alpha
    self.beta = beta
    self.stochdepth_rate = stochdepth_rate
    self.skip_gain = skip_gain

  def branch(self, x: jax.Array) -> jax.Array:
    """Maps the activated input to the residual."""
    raise NotImplementedError

  def project(self, x: jax.Array) -> jax.Array:
    """Maps the activated input to the shortcut of a transition block."""
    raise NotImplementedError

  def __call__(
    self, x: jax.Array, key: jax.Array | None, positions: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the block's output and the branch's average channel variance.

    Args:
      x: `[N, H, W, C]`.
      key: random key of this block and step; None in evaluation.
      positions: `[N]`, see `layers.example_keys`.
    """
    out = self.activation(x) * self.beta
    shortcut = self.project(out) if self.is_transition else x
    out = self.branch(out)
    residual_var = layers.signal_statistics(out)['var']
    out = layers.stochastic_depth(out, self.stochdepth_rate, key, positions)
    return self.alpha * self.gain(out.dtype) * out + shortcut, residual_var

  def gain(self, dtype: jnp.dtype) -> jax.Array:
    """Returns the branch's learnt gain, a scalar."""
    init = hk.initializers.Constant(self.skip_gain)
    return hk.get_parameter('skip_gain', (), dtype, init=init)


def downsample(x: jax.Array, stride: int) -> jax.Array:
  """Averages windows of 2 x 2 pixels, if the stride is 2.

  SAME pooling: windows cut by the border average what they hold.
  """
  if stride == 1:
    return x
  # A window larger than the map is summed twice by XLA on CPU (jax 0.10 to
  # 0.12).
  height, width = x.shape[1:3]
  window = (1, min(2, height), min(2, width), 1)
  return hk.avg_pool(x, window, (1, 2, 2, 1), 'SAME')
