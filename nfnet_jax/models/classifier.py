"""What all families share: the way from images to logits."""

from collections.abc import Sequence
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from nfnet_jax.models import layers

# Options of every family that act in training only.
REGULARIZATION = ('stochdepth_rate', 'dropout_rate')


class BlockSpec(NamedTuple):
  """A block's place in its network, and what follows from it.

  Attributes:
    stage: index of its stage.
    is_transition: whether it opens the stage.
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
  """Lists the places of all blocks, from fine to coarse.

  Args:
    depth: blocks of each stage.
    strides: stride of each stage's first block.
    stochdepth_rate: drop rate that the blocks approach linearly, from 0: block
      i of N has `stochdepth_rate * i / N`.
  """
  firsts = [
    (stage, index == 0)
    for stage, blocks in enumerate(depth)
    for index in range(blocks)
  ]
  return [
    BlockSpec(
      stage,
      is_first,
      strides[stage] if is_first else 1,
      stochdepth_rate * number / len(firsts),
    )
    for number, (stage, is_first) in enumerate(firsts)
  ]


class ImageClassifier(hk.Module):
  """A stem, residual blocks, a head and a linear classifier.

  A family's constructor sets the attributes; the family defines `stem` and
  `head`.

  Attributes:
    depth: blocks of each stage, from fine to coarse.
    blocks: modules that map `(x, key, positions)` to their output and the
      average channel variance of their branch; `key` is None in evaluation.
    dropout_rate: rate on the pooled features.
    classifier: maps them to logits.
  """

  depth: Sequence[int]
  blocks: Sequence[hk.Module]
  dropout_rate: float
  classifier: hk.Linear

  def stem(self, images: jax.Array, is_training: bool) -> jax.Array:
    """Maps images to the first block's input."""
    raise NotImplementedError

  def head(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Maps the last block's output to what is averaged into features."""
    raise NotImplementedError

  def __call__(
    self,
    images: jax.Array,
    is_training: bool,
    positions: jax.Array | None = None,
    remat: bool = False,
  ) -> jax.Array:
    """Maps normalised images `[N, H, W, 3]` to logits `[N, num_classes]`.

    Args:
      images: float images, normalised a channel.
      is_training: whether stochastic depth and dropout act, and whether batch
        statistics are taken, if the family has any. Only then is a random key
        drawn.
      positions: `[N]` each example's place in the global batch, from which its
        random draws derive; 0 to N - 1 by default.
      remat: whether only the blocks' inputs are kept for the backward pass,
        which then computes the blocks again. Values are the same.
    """
    return self.endpoints(images, is_training, positions, remat)['logits']

  def endpoints(
    self,
    images: jax.Array,
    is_training: bool,
    positions: jax.Array | None = None,
    remat: bool = False,
  ) -> dict[str, jax.Array | dict[str, jax.Array]]:
    """Runs the network and returns what is worth looking at on the way.

    Returns:
      A dict with `block_0`, `block_1`, ... (each a dict of `sq_mean` and `var`
      of the block's output and `residual_var` of its branch before it is scaled
      and added), `features [N, channels]` (pooled, before dropout) and
      `logits`.
    """
    key = hk.next_rng_key() if is_training else None
    if positions is None:
      positions = jnp.arange(images.shape[0])
    outputs = {}
    x = self.stem(images, is_training)
    stages = [i for i, blocks in enumerate(self.depth) for _ in range(blocks)]
    for index, (stage, block) in enumerate(
      zip(stages, self.blocks, strict=True)
    ):
      block_key = jax.random.fold_in(key, index) if is_training else None
      # What a profile and a plan call the parts of a step.
      with jax.named_scope(f'stage_{stage}'):
        run = hk.remat(block) if remat else block
        x, residual_var = run(x, block_key, positions)
      outputs[f'block_{index}'] = {
        **layers.signal_statistics(x),
        'residual_var': residual_var,
      }
    features = jnp.mean(self.head(x, is_training), axis=(1, 2))
    outputs['features'] = features
    if is_training:
      dropout_key = jax.random.fold_in(key, len(self.blocks))
      features = layers.dropout(
        features, self.dropout_rate, dropout_key, positions
      )
    outputs['logits'] = self.classifier(features)
    return outputs


def lookup(table: dict, variant: str, family: str):
  """Returns a family's variant.

  Raises:
    ValueError: if it is unknown; the message lists the known ones.
  """
  if variant not in table:
    raise ValueError(
      f"Unknown {family} variant '{variant}'; known: {', '.join(table)}."
    )
  return table[variant]
