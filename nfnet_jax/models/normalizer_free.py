"""The residual block that the normalizer-free families share.

Brock et al., "Characterizing signal propagation to close the performance gap in
unnormalized ResNets" (arXiv 2101.08692), section 4, and arXiv 2102.06171,
section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import math
from typing import Any

import haiku as hk
import jax
from jax.typing import DTypeLike

from nfnet_jax.models import layers, residual

# The families' default weight of a residual branch.
ALPHA = 0.2


def betas(depth: Sequence[int], alpha: float) -> list[float]:
  """Return 1 / the standard deviation expected at each block's input.

  Every block adds `alpha ** 2` to the variance. A stage's first block restarts
  from 1, because its shortcut is computed from the input divided by its
  standard deviation.

  Args:
    depth: blocks per stage.
    alpha: weight of each residual branch.

  Examples:
    >>> [round(beta ** -2, 2) for beta in betas((1, 2, 2), alpha=0.2)]
    [1.0, 1.04, 1.04, 1.08, 1.04]
  """
  result, variance = [], 1.0
  for blocks in depth:
    for index in range(blocks):
      result.append(1 / math.sqrt(variance))
      variance = (1.0 if index == 0 else variance) + alpha**2
  return result


class NormalizerFreeBlock(residual.ResidualBlock):
  """The residual block `shortcut + alpha * skip_gain * branch`.

  Branch and projected shortcut are computed from `activation(x) * beta`; any
  other shortcut is `x`. The paper writes f(x / std); the released code computes
  f(x) / std, which differs for GELU and SiLU. A family's constructor sets the
  attributes; the family defines `project`.

  Attributes:
    convs: the branch's convolutions, with activations between them.
    squeeze_excite: maps the branch's output to gates of its channels, or None.
  """

  convs: Sequence[layers.ScaledWSConv2D]
  squeeze_excite: Callable[[jax.Array], jax.Array] | None

  def __init__(
    self,
    *,
    activation: layers.Activation,
    alpha: float,
    beta: float,
    skip_gain: float = 0.0,
    **residual_options: Any,
  ):
    """Set what the families share.

    Args:
      activation: gamma-scaled; see `layers.scaled_activation`.
      alpha: weight of the branch.
      beta: see `betas`.
      skip_gain: initial value of the branch's learnt gain. The analysis of the
        signal's variance at initialisation holds only for 1.
      **residual_options: see `residual.ResidualBlock`.
    """
    super().__init__(**residual_options)
    self.activation = activation
    self.alpha = alpha
    self.beta = beta
    self.skip_gain = skip_gain

  def preactivate(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Apply the activation and divide by the expected standard deviation."""
    return self.activation(x) * self.beta

  def branch(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Apply the convolutions and squeeze-excite."""
    x = self.convs[0](x)
    for conv in self.convs[1:]:
      x = conv(self.activation(x))
    if self.squeeze_excite is None:
      return x
    # Gates average 1/2, so 2 restores the variance.
    return 2 * self.squeeze_excite(x) * x

  def merge(self, out: jax.Array, shortcut: jax.Array) -> jax.Array:
    """Add the scaled branch to the shortcut."""
    return self.alpha * self.gain(out.dtype) * out + shortcut

  def gain(self, dtype: DTypeLike) -> jax.Array:
    """Return the branch's learnt gain, a scalar."""
    init = hk.initializers.Constant(self.skip_gain)
    return hk.get_parameter('skip_gain', (), dtype, init=init)


def downsample(x: jax.Array, stride: int) -> jax.Array:
  """Average windows of 2 x 2 pixels if the stride is 2; return `x` if it is 1.

  SAME pooling: a window at the border averages only the pixels inside.
  """
  if stride == 1:
    return x
  # XLA on CPU counts a window twice if it is larger than the feature map (jax
  # 0.10 to 0.12).
  height, width = x.shape[1:3]
  window = (1, min(2, height), min(2, width), 1)
  return hk.avg_pool(x, window, (1, 2, 2, 1), 'SAME')
