"""Batch-normalised ResNets, to compare the normalizer-free ones with.

He et al., "Identity Mappings in Deep Residual Networks" (arXiv 1603.05027) for
the pre-activation networks; He et al., "Deep Residual Learning for Image
Recognition" (arXiv 1512.03385) and Hu et al., "Squeeze-and-Excitation Networks"
(arXiv 1709.01507) for ResNet-50 and SENet-50.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
from typing import ClassVar

import haiku as hk
import jax

from nfnet_jax.models import (
  batch_norm,
  classifier,
  layers,
  nf_resnet,
  propagation,
  residual,
)

# Depths, widths and sizes are those of NF-ResNets.
VARIANTS = nf_resnet.VARIANTS


class BNResNet(classifier.ImageClassifier):
  """The pre-activation ResNet image classifier (ResNet v2).

  Examples:
    >>> import jax.numpy as jnp
    >>> def predict(images):
    ...   return BNResNet(10, 'pico')(images, is_training=False)
    >>> net = hk.transform_with_state(predict)
    >>> images = jnp.zeros((2, 32, 32, 3))
    >>> params, state = jax.eval_shape(net.init, jax.random.key(0), images)
    >>> state['ResNet/~/final_bn/~/var_ema']['average'].shape
    (1, 1, 1, 128)
  """

  variants: ClassVar[Mapping[str, nf_resnet.Variant]] = VARIANTS
  uses_batch_statistics = True

  def __init__(
    self,
    num_classes: int = 1000,
    variant: str = '50',
    *,
    se_ratio: float = 0.0,
    stochdepth_rate: float = 0.1,
    dropout_rate: float | None = None,
    cross_replica_bn: bool = False,
    name: str = 'ResNet',
  ):
    """Create the modules.

    Args:
      num_classes: Size of the logits.
      variant: A key of `VARIANTS`.
      se_ratio: Hidden units of squeeze-excite per channel, such as 0.25; 0 for
        no squeeze-excite.
      stochdepth_rate: Stochastic depth rate, which grows linearly from 0 with
        the block's index.
      dropout_rate: Dropout rate on the pooled features; None takes the
        variant's.
      cross_replica_bn: Share batch statistics across devices in training.
      name: Root of all parameter paths.

    Raises:
      ValueError: if the variant is unknown.
    """
    super().__init__(
      num_classes,
      variant,
      dropout_rate=dropout_rate,
      w_init=hk.initializers.Constant(0),
      name=name,
    )
    row = self.variants[variant]
    self.depth = row.depth
    norm = functools.partial(
      batch_norm.BatchNorm, cross_replica_bn=cross_replica_bn
    )
    self.initial_conv = batch_norm.conv(row.stem, 7, 2, name='initial_conv')
    self.blocks = [
      ResBlockV2(
        row.width[spec.stage],
        stride=spec.stride,
        is_transition=spec.is_transition,
        se_ratio=se_ratio,
        stochdepth_rate=spec.stochdepth_rate,
        norm=norm,
      )
      for spec in residual.block_specs(
        row.depth, nf_resnet.STRIDES, stochdepth_rate
      )
    ]
    self.final_bn = norm(name='final_bn')

  @classmethod
  def expected_variance(cls, variant: str) -> list[float]:
    """Return the variance after each block at initialisation."""
    return propagation.batch_norm_variance(cls.variants[variant].depth)

  def stem(self, images: jax.Array, is_training: bool) -> jax.Array:
    """Apply a strided 7x7 convolution and max pooling."""
    return layers.max_pool(self.initial_conv(images))

  def head(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Normalise and apply the activation."""
    return jax.nn.relu(self.final_bn(x, is_training))


class ResBlockV2(batch_norm.PreActivationBlock):
  """The pre-activation bottleneck block: BN, ReLU, convolution, three times.

  The convolutions are 1x1, 3x3 (strided) and 1x1. The projection is a strided
  1x1.
  """

  def __init__(
    self,
    channels: int,
    *,
    stride: int,
    is_transition: bool,
    se_ratio: float,
    stochdepth_rate: float,
    norm: batch_norm.NormFactory = batch_norm.BatchNorm,
    name: str = 'res_block_v2',
  ):
    super().__init__(
      is_transition=is_transition, stochdepth_rate=stochdepth_rate, name=name
    )
    self.activation = jax.nn.relu
    inner = channels // 4
    conv = batch_norm.conv
    self.norms = [norm(name=f'bn{index}') for index in range(3)]
    self.convs = [
      conv(inner, 1, name='conv0'),
      conv(inner, 3, stride, name='conv1'),
      conv(channels, 1, name='conv2'),
    ]
    if is_transition:
      self.conv_shortcut = conv(channels, 1, stride, name='conv_shortcut')
    self.squeeze_excite = layers.optional_squeeze_excite(channels, se_ratio)

  def project(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Convolve with stride."""
    return self.conv_shortcut(x)


@dataclasses.dataclass(frozen=True)
class VariantV1(nf_resnet.Variant):
  """The sizes of a post-activation ResNet.

  Attributes:
    se_ratio: hidden units of squeeze-excite per channel; 0 for none.
  """

  se_ratio: float = 0.0


VARIANTS_V1: dict[str, VariantV1] = {
  'resnet50': VariantV1((3, 4, 6, 3)),
  'senet50': VariantV1((3, 4, 6, 3), se_ratio=1 / 16),
  # For CPUs and small images.
  'senet_pico': VariantV1(
    (1, 2, 1, 1), (16, 32, 64, 128), 8, 32, 32, se_ratio=1 / 16
  ),
}


# ImageNet top-1 in percent.
PUBLISHED_TOP1_V1 = {
  'arXiv 2102.06171, table 3': {'resnet50': 78.6, 'senet50': 79.4}
}


class ResNetV1(classifier.ImageClassifier):
  """The post-activation ResNet image classifier, with or without SE.

  The 3x3 convolution has the stride (often called v1.5). Only that gives the
  multiply-adds that the paper reports: 4.09 G at 224 px, where the table has
  4.10 G for ResNet-50 and 4.09 G for SENet-50; a stride in the 1x1 gives
  3.86 G. Parameters are 25,557,032 and 28,088,024; the table has 26.0 M and
  28.0 M.

  Source of the table: arXiv 2102.06171, table 3.

  Examples:
    >>> import jax.numpy as jnp
    >>> def predict(images):
    ...   return ResNetV1(10, 'senet_pico')(images, is_training=False)
    >>> net = hk.transform_with_state(predict)
    >>> images = jnp.zeros((2, 32, 32, 3))
    >>> params, state = jax.eval_shape(net.init, jax.random.key(0), images)
    >>> params['ResNet/~/linear']['w'].shape
    (128, 10)
  """

  variants: ClassVar[Mapping[str, VariantV1]] = VARIANTS_V1
  uses_batch_statistics = True
  published_top1 = PUBLISHED_TOP1_V1

  def __init__(
    self,
    num_classes: int = 1000,
    variant: str = 'resnet50',
    *,
    stochdepth_rate: float = 0.0,
    dropout_rate: float | None = None,
    cross_replica_bn: bool = False,
    name: str = 'ResNet',
  ):
    """Create the modules.

    Args:
      num_classes: Size of the logits.
      variant: A key of `VARIANTS_V1`.
      stochdepth_rate: Stochastic depth rate, which grows linearly from 0 with
        the block's index.
      dropout_rate: Dropout rate on the pooled features; None takes the
        variant's.
      cross_replica_bn: Share batch statistics across devices in training.
      name: Root of all parameter paths.

    Raises:
      ValueError: if the variant is unknown.
    """
    super().__init__(
      num_classes,
      variant,
      dropout_rate=dropout_rate,
      w_init=hk.initializers.RandomNormal(stddev=0.01),
      name=name,
    )
    row = self.variants[variant]
    self.depth = row.depth
    norm = functools.partial(
      batch_norm.BatchNorm, cross_replica_bn=cross_replica_bn
    )
    self.initial_conv = batch_norm.conv(row.stem, 7, 2, name='initial_conv')
    self.initial_bn = norm(name='initial_bn')
    self.blocks = [
      ResBlockV1(
        row.width[spec.stage],
        stride=spec.stride,
        is_transition=spec.is_transition,
        se_ratio=row.se_ratio,
        stochdepth_rate=spec.stochdepth_rate,
        norm=norm,
      )
      for spec in residual.block_specs(
        row.depth, nf_resnet.STRIDES, stochdepth_rate
      )
    ]

  def stem(self, images: jax.Array, is_training: bool) -> jax.Array:
    """Apply a strided 7x7 convolution, normalise, and apply max pooling."""
    x = self.initial_bn(self.initial_conv(images), is_training)
    return layers.max_pool(jax.nn.relu(x))

  def head(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Return the last block's output."""
    return x


class ResBlockV1(residual.ResidualBlock):
  """The post-activation bottleneck block `relu(shortcut + branch)`.

  The branch is convolution and BN three times with ReLU between: 1x1, 3x3
  (strided), 1x1; then squeeze-excite, if any.
  """

  def __init__(
    self,
    channels: int,
    *,
    stride: int,
    is_transition: bool,
    se_ratio: float,
    stochdepth_rate: float,
    norm: batch_norm.NormFactory = batch_norm.BatchNorm,
    name: str = 'res_block_v1',
  ):
    super().__init__(
      is_transition=is_transition, stochdepth_rate=stochdepth_rate, name=name
    )
    inner = channels // 4
    conv = batch_norm.conv
    self.convs = [
      conv(inner, 1, name='conv0'),
      conv(inner, 3, stride, name='conv1'),
      conv(channels, 1, name='conv2'),
    ]
    self.norms = [norm(name=f'bn{index}') for index in range(3)]
    if is_transition:
      self.conv_shortcut = conv(channels, 1, stride, name='conv_shortcut')
      self.bn_shortcut = norm(name='bn_shortcut')
    self.squeeze_excite = layers.optional_squeeze_excite(channels, se_ratio)

  def project(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Convolve with stride and normalise."""
    return self.bn_shortcut(self.conv_shortcut(x), is_training)

  def branch(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Apply the normalised convolutions and squeeze-excite."""
    x = self.norms[0](self.convs[0](x), is_training)
    for conv, norm in zip(self.convs[1:], self.norms[1:]):
      x = norm(conv(jax.nn.relu(x)), is_training)
    if self.squeeze_excite is not None:
      x = self.squeeze_excite(x) * x
    return x

  def merge(self, out: jax.Array, shortcut: jax.Array) -> jax.Array:
    """Add the shortcut and apply the activation."""
    return jax.nn.relu(out + shortcut)
