"""NFNets with batch normalisation in place of normalizer-free scaling.

The rows "-NF, +BN" of table 6 of Brock et al., "High-Performance Large-Scale
Image Recognition Without Normalization" (arXiv 2102.06171). The paper names
these networks without printing them; what this file chose is said below.
"""

import functools

import haiku as hk
import jax

from nfnet_jax.models import (
  batch_norm,
  classifier,
  layers,
  nfnet,
  normalizer_free,
)


class BNNFNet(classifier.ImageClassifier):
  """The NFNet image classifier with batch normalisation.

  Widths, depths, groups, squeeze-excite and regularisation are NFNet's. Chosen
  here: batch normalisation before every activation; plain convolutions without
  biases; none of alpha, beta, gamma, skip gain and the factor 2 of
  squeeze-excite. The paper found F4 and F5 of this kind unstable in bfloat16.

  Example:
    >>> import jax.numpy as jnp
    >>> def predict(images):
    ...   return BNNFNet(10, 'pico')(images, is_training=False)
    >>> net = hk.transform_with_state(predict)
    >>> images = jnp.zeros((2, 32, 32, 3))
    >>> params, state = jax.eval_shape(net.init, jax.random.key(0), images)
    >>> params['BN_NFNet/~/linear']['w'].shape
    (192, 10)
  """

  def __init__(
    self,
    num_classes: int = 1000,
    variant: str = 'f0',
    *,
    stochdepth_rate: float = 0.25,
    dropout_rate: float | None = None,
    cross_replica_axis: str | None = None,
    name: str = 'BN_NFNet',
  ):
    """Builds the modules.

    Args:
      num_classes: size of the logits.
      variant: a key of `nfnet.VARIANTS`.
      stochdepth_rate: drop rate that the blocks approach linearly, from 0.
      dropout_rate: rate on the pooled features; None takes the variant's.
      cross_replica_axis: see `batch_norm.BatchNorm`; the paper's networks took
        each device's own statistics.
      name: the root of all parameter paths.

    Raises:
      ValueError: if the variant is unknown.
    """
    super().__init__(name=name)
    spec = classifier.lookup(nfnet.VARIANTS, variant, 'NFNet')
    self.depth = spec.depth
    self.dropout_rate = spec.dropout if dropout_rate is None else dropout_rate
    norm = functools.partial(
      batch_norm.BatchNorm, cross_replica_axis=cross_replica_axis
    )
    stem_channels = (*spec.stem, spec.width[0] // 2)
    self.stem_convs = [
      batch_norm.conv(channels, 3, stride, name=f'stem_conv{i}')
      for i, (channels, stride) in enumerate(zip(stem_channels, (2, 1, 1, 2)))
    ]
    self.stem_norms = [norm(name=f'stem_bn{i}') for i in range(3)]
    self.blocks = [
      BNBlock(
        spec.width[place.stage],
        stride=place.stride,
        is_transition=place.is_transition,
        group_size=spec.group_size,
        stochdepth_rate=place.stochdepth_rate,
        norm=norm,
      )
      for place in classifier.block_specs(
        spec.depth, nfnet.STRIDES, stochdepth_rate
      )
    ]
    self.final_conv = batch_norm.conv(2 * spec.width[-1], 1, name='final_conv')
    self.final_bn = norm(name='final_bn')
    self.classifier = hk.Linear(
      num_classes,
      w_init=hk.initializers.RandomNormal(0, 0.01),
      name='linear',
    )

  def stem(self, images: jax.Array, is_training: bool) -> jax.Array:
    x = self.stem_convs[0](images)
    for norm, conv in zip(self.stem_norms, self.stem_convs[1:]):
      x = conv(jax.nn.gelu(norm(x, is_training)))
    return x

  def head(self, x: jax.Array, is_training: bool) -> jax.Array:
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
    name: str = 'bn_block',
  ):
    super().__init__(name=name)
    self.stride = stride
    self.is_transition = is_transition
    self.activation = jax.nn.gelu
    self.stochdepth_rate = stochdepth_rate
    groups = channels // 2 // group_size
    inner = groups * group_size
    conv = batch_norm.conv
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

  def project(self, x: jax.Array) -> jax.Array:
    return self.conv_shortcut(normalizer_free.downsample(x, self.stride))
