"""The residual block that the families share, and the positions of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import haiku as hk
import jax

from nfnet_jax.models import layers


class BlockSpec(NamedTuple):
  """A block's position in its network, and what follows from it.

  Attributes:
    stage: index of its stage.
    is_transition: whether it is the first of the stage.
    stride: the stage's stride in a transition block, else 1.
    stochdepth_rate: probability of dropping its branch in training.
  """

  stage: int
  is_transition: bool
  stride: int
  stochdepth_rate: float


def block_specs(
  depth: Sequence[int], strides: Sequence[int], stochdepth_rate: float
) -> list[BlockSpec]:
  """List the positions of all blocks, from fine to coarse.

  Args:
    depth: blocks per stage.
    strides: stride of each stage's first block.
    stochdepth_rate: block i of N drops its branch with probability
      `stochdepth_rate * i / N`.
  """
  positions = [
    (stage, index == 0)
    for stage, blocks in enumerate(depth)
    for index in range(blocks)
  ]
  return [
    BlockSpec(
      stage,
      is_first,
      strides[stage] if is_first else 1,
      stochdepth_rate * number / len(positions),
    )
    for number, (stage, is_first) in enumerate(positions)
  ]


class ResidualBlock(hk.Module):
  """A residual block: `merge(branch(a), shortcut)` of `a = preactivate(x)`.

  The shortcut is `project(a)` in a transition block and `x` in others. A
  subclass defines `branch`, `project` if it has transition blocks, and
  `preactivate` and `merge` where they differ from the identity and the sum.

  Attributes:
    rescale_survivors: whether stochastic depth scales the branches that it
      keeps; see `layers.stochastic_depth`.
  """

  rescale_survivors = False

  def __init__(
    self,
    *,
    is_transition: bool,
    stochdepth_rate: float,
    name: str | None = None,
  ):
    """Set what all blocks have.

    Args:
      is_transition: whether the shortcut is projected.
      stochdepth_rate: probability of dropping the branch in training.
      name: module name.
    """
    super().__init__(name=name)
    self.is_transition = is_transition
    self.stochdepth_rate = stochdepth_rate

  def preactivate(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Map the block's input to the input of the branch and the projection."""
    return x

  def project(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Map the preactivated input to the shortcut of a transition block."""
    raise NotImplementedError

  def branch(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Map the preactivated input to the residual."""
    raise NotImplementedError

  def merge(self, out: jax.Array, shortcut: jax.Array) -> jax.Array:
    """Combine the branch's output and the shortcut."""
    return out + shortcut

  def __call__(
    self, x: jax.Array, key: jax.Array | None, positions: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Return the block's output and the branch's average channel variance.

    Args:
      x: `[N, H, W, C]`.
      key: random key of this block and step; None in evaluation, where batch
        normalisation uses its running statistics.
      positions: `[N]`, see `layers.example_keys`.
    """
    is_training = key is not None
    out = self.preactivate(x, is_training)
    shortcut = self.project(out, is_training) if self.is_transition else x
    out = self.branch(out, is_training)
    residual_var = layers.signal_statistics(out)['var']
    out = layers.stochastic_depth(
      out, self.stochdepth_rate, key, positions, self.rescale_survivors
    )
    return self.merge(out, shortcut), residual_var
