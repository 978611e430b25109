"""EfficientNets, to compare NFNets with.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural
Networks" (arXiv 1905.11946).
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import ClassVar

import haiku as hk
import jax

from nfnet_jax.models import batch_norm, classifier, layers, residual


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage of the network before scaling.

  Attributes:
    kernel_size: of the depthwise convolutions.
    depth: blocks.
    width: output channels.
    expansion: inner channels per input channel.
    stride: of the first block.
  """

  kernel_size: int
  depth: int
  width: int
  expansion: int
  stride: int


# Table 1 of the paper.
STAGES = (
  Stage(3, 1, 16, 1, 1),
  Stage(3, 2, 24, 6, 2),
  Stage(5, 2, 40, 6, 2),
  Stage(3, 3, 80, 6, 2),
  Stage(5, 3, 112, 6, 1),
  Stage(5, 4, 192, 6, 2),
  Stage(3, 1, 320, 6, 1),
)


@dataclasses.dataclass(frozen=True)
class Variant:
  """How a network is scaled.

  Attributes:
    width: factor on channels.
    depth: factor on blocks.
    train_size: pixels a side in training.
    test_size: pixels a side in evaluation.
    dropout: rate on the pooled features.
  """

  width: float
  depth: float
  train_size: int
  test_size: int
  dropout: float


VARIANTS: dict[str, Variant] = {
  'b0': Variant(1.0, 1.0, 224, 224, 0.2),
  'b1': Variant(1.0, 1.1, 240, 240, 0.2),
  'b2': Variant(1.1, 1.2, 260, 260, 0.3),
  'b3': Variant(1.2, 1.4, 300, 300, 0.3),
  'b4': Variant(1.4, 1.8, 380, 380, 0.4),
  'b5': Variant(1.6, 2.2, 456, 456, 0.4),
  'b6': Variant(1.8, 2.6, 528, 528, 0.5),
  'b7': Variant(2.0, 3.1, 600, 600, 0.5),
  # For CPUs and small images.
  'pico': Variant(0.25, 0.33, 32, 32, 0.2),
}


def scale_channels(channels: int, factor: float) -> int:
  """Scale a width to the nearest multiple of 8 that loses less than a tenth.

  Examples:
    >>> [scale_channels(channels, 1.1) for channels in (16, 24, 32, 40)]
    [16, 24, 32, 48]
  """
  scaled = channels * factor
  rounded = max(8, int(scaled + 4) // 8 * 8)
  return rounded + 8 if rounded < 0.9 * scaled else rounded


# ImageNet top-1 in percent.
PUBLISHED_TOP1 = {
  'arXiv 2102.06171, table 3': {
    'b0': 77.1,
    'b3': 81.6,
    'b4': 82.9,
    'b5': 83.7,
    'b6': 84.0,
    'b7': 84.7,
  },
}


class EfficientNet(classifier.ImageClassifier):
  """The EfficientNet image classifier.

  Examples:
    >>> import jax.numpy as jnp
    >>> def predict(images):
    ...   return EfficientNet(10, 'pico')(images, is_training=False)
    >>> net = hk.transform_with_state(predict)
    >>> images = jnp.zeros((2, 32, 32, 3))
    >>> params, state = jax.eval_shape(net.init, jax.random.key(0), images)
    >>> params['EfficientNet/~/linear']['w'].shape
    (320, 10)
  """

  variants: ClassVar[Mapping[str, Variant]] = VARIANTS
  uses_batch_statistics = True
  published_top1 = PUBLISHED_TOP1

  def __init__(
    self,
    num_classes: int = 1000,
    variant: str = 'b0',
    *,
    stochdepth_rate: float = 0.2,
    dropout_rate: float | None = None,
    cross_replica_bn: bool = False,
    fast_convs: bool = False,
    name: str = 'EfficientNet',
  ):
    """Create the modules.

    Args:
      num_classes: Size of the logits.
      variant: A key of `VARIANTS`.
      stochdepth_rate: Rate of drop-connect, which grows linearly from 0 with
        the block's index.
      dropout_rate: Dropout rate on the pooled features; None takes the
        variant's.
      cross_replica_bn: Share batch statistics across devices in training.
      fast_convs: Compute 1 x 1 convolutions as matrix products and depthwise
        ones as sums of shifted images, which suits CPUs; see
        `models.fast.convolutions`.
      name: Root of all parameter paths.

    Raises:
      ValueError: if the variant is unknown.
    """
    super().__init__(
      num_classes,
      variant,
      dropout_rate=dropout_rate,
      w_init=hk.initializers.VarianceScaling(1 / 3, 'fan_out', 'uniform'),
      name=name,
    )
    row = self.variants[variant]
    self.depth = [math.ceil(stage.depth * row.depth) for stage in STAGES]
    width = functools.partial(scale_channels, factor=row.width)
    norm = functools.partial(
      batch_norm.BatchNorm,
      decay_rate=0.99,
      eps=1e-3,
      cross_replica_bn=cross_replica_bn,
    )
    conv = functools.partial(
      batch_norm.conv,
      fast=fast_convs,
      w_init=hk.initializers.VarianceScaling(2.0, 'fan_out', 'normal'),
    )
    channels = width(32)
    self.stem_conv = conv(channels, 3, 2, name='stem_conv')
    self.stem_bn = norm(name='stem_bn')
    self.blocks: list[MBConv] = []
    strides = [stage.stride for stage in STAGES]
    for spec in residual.block_specs(self.depth, strides, stochdepth_rate):
      stage = STAGES[spec.stage]
      self.blocks.append(
        MBConv(
          channels,
          width(stage.width),
          kernel_size=stage.kernel_size,
          stride=spec.stride,
          expansion=stage.expansion,
          stochdepth_rate=spec.stochdepth_rate,
          norm=norm,
          conv=conv,
        )
      )
      channels = width(stage.width)
    self.final_conv = conv(width(1280), 1, name='final_conv')
    self.final_bn = norm(name='final_bn')

  def stem(self, images: jax.Array, is_training: bool) -> jax.Array:
    """Apply a strided 3x3 convolution, normalise, and apply the activation."""
    return jax.nn.silu(self.stem_bn(self.stem_conv(images), is_training))

  def head(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Apply a 1x1 convolution, normalise, and apply the activation."""
    return jax.nn.silu(self.final_bn(self.final_conv(x), is_training))


class MBConv(residual.ResidualBlock):
  """The inverted bottleneck block with squeeze-excite.

  The branch is 1x1 (unless the expansion is 1), depthwise (strided),
  squeeze-excite and 1x1, each convolution normalised, with SiLU after the first
  two. The input is added to it where stride and channels allow.
  """

  rescale_survivors = True

  def __init__(
    self,
    channels_in: int,
    channels: int,
    *,
    kernel_size: int,
    stride: int,
    expansion: int,
    stochdepth_rate: float,
    norm: batch_norm.NormFactory = batch_norm.BatchNorm,
    conv: batch_norm.ConvFactory = batch_norm.conv,
    name: str = 'mb_conv',
  ):
    self.is_residual = stride == 1 and channels_in == channels
    super().__init__(
      is_transition=False,
      stochdepth_rate=stochdepth_rate if self.is_residual else 0.0,
      name=name,
    )
    self.expansion = expansion
    inner = channels_in * expansion
    if expansion > 1:
      self.expand_conv = conv(inner, 1, name='expand_conv')
      self.expand_bn = norm(name='expand_bn')
    self.depthwise_conv = conv(
      inner,
      kernel_size,
      stride,
      groups=inner,
      # Fan-out of one channel.
      w_init=hk.initializers.RandomNormal(stddev=math.sqrt(2) / kernel_size),
      name='depthwise_conv',
    )
    self.depthwise_bn = norm(name='depthwise_bn')
    # A quarter of the block's input, not of the expanded channels.
    self.squeeze_excite = layers.SqueezeExcite(
      inner, channels_in // 4, jax.nn.silu, name='squeeze_excite'
    )
    self.project_conv = conv(channels, 1, name='project_conv')
    self.project_bn = norm(name='project_bn')

  def branch(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Expand, filter, gate and project."""
    if self.expansion > 1:
      x = jax.nn.silu(self.expand_bn(self.expand_conv(x), is_training))
    x = self.depthwise_conv(x)
    x = jax.nn.silu(self.depthwise_bn(x, is_training))
    x = self.squeeze_excite(x) * x
    return self.project_bn(self.project_conv(x), is_training)

  def merge(self, out: jax.Array, shortcut: jax.Array) -> jax.Array:
    """Add the shortcut, if there is one."""
    return shortcut + out if self.is_residual else out
