"""NFNets with batch normalisation in place of normalizer-free scaling.

The rows "-NF, +BN" of table 6 of Brock et al., "High-Performance Large-Scale
Image Recognition Without Normalization" (arXiv 2102.06171). The paper names
these networks without specifying them; `BNNFNet` lists what was chosen here.
"""

from __future__ import annotations

from collections.abc import Mapping
import functools
from typing import ClassVar

import haiku as hk
import jax

from nfnet_jax.models import (
  batch_norm,
  classifier,
  layers,
  nfnet,
  normalizer_free,
  residual,
)

# ImageNet top-1 in percent.
PUBLISHED_TOP1 = {
  'arXiv 2102.06171, table 6': {
    'f0': 83.4,
    'f1': 84.4,
    'f2': 85.1,
    'f3': 85.5,
  },
}


class BNNFNet(classifier.ImageClassifier):
  """The NFNet image classifier with batch normalisation.

  Widths, depths, groups, squeeze-excite and regularisation are NFNet's. Chosen
  here: batch normalisation before every activation; plain convolutions without
  biases; none of alpha, beta, gamma, skip gain and the factor 2 of
  squeeze-excite. The paper found F4 and F5 of this kind unstable in bfloat16,
  and shared no batch statistics across devices.

  Examples:
    >>> import jax.numpy as jnp
    >>> def predict(images):
    ...   return BNNFNet(10, 'pico')(images, is_training=False)
    >>> net = hk.transform_with_state(predict)
    >>> images = jnp.zeros((2, 32, 32, 3))
    >>> params, state = jax.eval_shape(net.init, jax.random.key(0), images)
    >>> params['BN_NFNet/~/linear']['w'].shape
    (192, 10)
  """

  variants: ClassVar[Mapping[str, nfnet.Variant]] = {
    name: row for name, row in nfnet.VARIANTS.items() if row.spatial_convs == 2
  }
  uses_batch_statistics = True
  eval_crop = 'squash'
  published_top1 = PUBLISHED_TOP1

  def __init__(
    self,
    num_classes: int = 1000,
    variant: str = 'f0',
    *,
    stochdepth_rate: float = 0.25,
    dropout_rate: float | None = None,
    cross_replica_bn: bool = False,
    fast_convs: bool = False,
    name: str = 'BN_NFNet',
  ):
    """Create the modules.

    Args:
      num_classes: Size of the logits.
      variant: A key of `nfnet.VARIANTS`.
      stochdepth_rate: Stochastic depth rate, which grows linearly from 0 with
        the block's index.
      dropout_rate: Dropout rate on the pooled features; None takes the
        variant's.
      cross_replica_bn: Share batch statistics across devices in training.
      fast_convs: Compute convolutions as plain ones and matrix products, which
        suits CPUs; see `models.fast.convolutions`.
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
    conv = functools.partial(batch_norm.conv, fast=fast_convs)
    stem_channels = (*row.stem, row.width[0] // 2)
    self.stem_convs = [
      conv(channels, 3, stride, name=f'stem_conv{i}')
      for i, (channels, stride) in enumerate(zip(stem_channels, (2, 1, 1, 2)))
    ]
    self.stem_norms = [norm(name=f'stem_bn{i}') for i in range(3)]
    self.blocks = [
      BNBlock(
        row.width[spec.stage],
        stride=spec.stride,
        is_transition=spec.is_transition,
        group_size=row.group_size,
        stochdepth_rate=spec.stochdepth_rate,
        norm=norm,
        conv=conv,
      )
      for spec in residual.block_specs(
        row.depth, nfnet.STRIDES, stochdepth_rate
      )
    ]
    self.final_conv = conv(2 * row.width[-1], 1, name='final_conv')
    self.final_bn = norm(name='final_bn')

  def stem(self, images: jax.Array, is_training: bool) -> jax.Array:
    """Apply four 3x3 convolutions, of strides 2, 1, 1 and 2."""
    x = self.stem_convs[0](images)
    for norm, conv in zip(self.stem_norms, self.stem_convs[1:]):
      x = conv(jax.nn.gelu(norm(x, is_training)))
    return x

  def head(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Apply a 1x1 convolution that doubles the channels, and normalise."""
    return jax.nn.gelu(self.final_bn(self.final_conv(x), is_training))


class BNBlock(batch_norm.PreActivationBlock):
  """NFNet's bottleneck block as BN, GELU, convolution, four times."""

  def __init__(
    self,
    channels: int,
    *,
    stride: int,
    is_transition: bool,
    group_size: int,
    stochdepth_rate: float,
    norm: batch_norm.NormFactory = batch_norm.BatchNorm,
    conv: batch_norm.ConvFactory = batch_norm.conv,
    name: str = 'bn_block',
  ):
    super().__init__(
      is_transition=is_transition, stochdepth_rate=stochdepth_rate, name=name
    )
    self.stride = stride
    self.activation = jax.nn.gelu
    groups = channels // 2 // group_size
    inner = groups * group_size
    self.norms = [norm(name=f'bn{i}') for i in ('0', '1', '1b', '2')]
    self.convs = [
      conv(inner, 1, name='conv0'),
      conv(inner, 3, stride, groups, name='conv1'),
      conv(inner, 3, 1, groups, name='conv1b'),
      conv(channels, 1, name='conv2'),
    ]
    if is_transition:
      self.conv_shortcut = conv(channels, 1, name='conv_shortcut')
    self.squeeze_excite = layers.SqueezeExcite(
      channels, channels // 2, name='squeeze_excite'
    )

  def project(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Pool and convolve."""
    return self.conv_shortcut(normalizer_free.downsample(x, self.stride))
