"""Batch-normalised ResNets, which the normalizer-free ones are compared with.

He et al., "Identity Mappings in Deep Residual Networks" (arXiv 1603.05027) for
the pre-activation networks; He et al., "Deep Residual Learning for Image
Recognition" (arXiv 1512.03385) and Hu et al., "Squeeze-and-Excitation Networks"
(arXiv 1709.01507) for ResNet-50 and SENet-50.
"""

import dataclasses
import functools

import haiku as hk
import jax

from nfnet_jax.models import batch_norm, classifier, layers, nf_resnet

# NF-ResNets have these depths, widths and sizes, so the two compare.
VARIANTS = nf_resnet.VARIANTS


class BNResNet(classifier.ImageClassifier):
  """The pre-activation ResNet image classifier (ResNet v2).

  Example:
    >>> import jax.numpy as jnp
    >>> def predict(images):
    ...   return BNResNet(10, 'pico')(images, is_training=False)
    >>> net = hk.transform_with_state(predict)
    >>> images = jnp.zeros((2, 32, 32, 3))
    >>> params, state = jax.eval_shape(net.init, jax.random.key(0), images)
    >>> state['ResNet/~/final_bn/~/var_ema']['average'].shape
    (1, 1, 1, 128)
  """

  def __init__(
    self,
    num_classes: int = 1000,
    variant: str = '50',
    *,
    se_ratio: float = 0.0,
    stochdepth_rate: float = 0.1,
    dropout_rate: float | None = None,
    cross_replica_axis: str | None = None,
    name: str = 'ResNet',
  ):
    """Builds the modules.

    Args:
      num_classes: size of the logits.
      variant: a key of `VARIANTS`.
      se_ratio: hidden units of squeeze-excite per channel, such as 0.25; 0 for
        none.
      stochdepth_rate: drop rate that the blocks approach linearly, from 0.
      dropout_rate: rate on the pooled features; None takes the variant's.
      cross_replica_axis: see `batch_norm.BatchNorm`; `training.data_parallel` names
        its axis `AXIS`.
      name: the root of all parameter paths.

    Raises:
      ValueError: if the variant is unknown.
    """
    super().__init__(name=name)
    spec = classifier.lookup(VARIANTS, variant, 'BN-ResNet')
    self.depth = spec.depth
    self.dropout_rate = spec.dropout if dropout_rate is None else dropout_rate
    norm = functools.partial(
      batch_norm.BatchNorm, cross_replica_axis=cross_replica_axis
    )
    self.initial_conv = batch_norm.conv(spec.stem, 7, 2, name='initial_conv')
    self.blocks = [
      ResBlockV2(
        spec.width[place.stage],
        stride=place.stride,
        is_transition=place.is_transition,
        se_ratio=se_ratio,
        stochdepth_rate=place.stochdepth_rate,
        norm=norm,
      )
      for place in classifier.block_specs(
        spec.depth, nf_resnet.STRIDES, stochdepth_rate
      )
    ]
    self.final_bn = norm(name='final_bn')
    self.classifier = hk.Linear(
      num_classes, w_init=hk.initializers.Constant(0), name='linear'
    )

  def stem(self, images: jax.Array, is_training: bool) -> jax.Array:
    return layers.max_pool(self.initial_conv(images))

  def head(self, x: jax.Array, is_training: bool) -> jax.Array:
    return jax.nn.relu(self.final_bn(x, is_training))


class ResBlockV2(batch_norm.PreActivationBlock):
  """The pre-activation bottleneck block: BN, ReLU, convolution, three times.

  The convolutions are 1x1, 3x3 (strided) and 1x1; the projection is a strided
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
    super().__init__(name=name)
    self.is_transition = is_transition
    self.activation = jax.nn.relu
    self.stochdepth_rate = stochdepth_rate
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

  def project(self, x: jax.Array) -> jax.Array:
    return self.conv_shortcut(x)


@dataclasses.dataclass(frozen=True)
class VariantV1(nf_resnet.Variant):
  """What tells one post-activation ResNet from another.

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


class ResNetV1(classifier.ImageClassifier):
  """The post-activation ResNet image classifier, with or without SE.

  The 3x3 convolution carries the stride (often called v1.5), which gives the
  multiply-adds of the table it is compared in: 4.09 G at 224 px, where the
  table says 4.10 for ResNet-50 and 4.09 for SENet-50; the original stride on
  the 1x1 gives 3.86. Parameters are 25,557,032 and 28,088,024, the table has
  26.0 M and 28.0 M.

  Source of the table: arXiv 2102.06171, table 3.

  Example:
    >>> import jax.numpy as jnp
    >>> def predict(images):
    ...   return ResNetV1(10, 'senet_pico')(images, is_training=False)
    >>> net = hk.transform_with_state(predict)
    >>> images = jnp.zeros((2, 32, 32, 3))
    >>> params, state = jax.eval_shape(net.init, jax.random.key(0), images)
    >>> params['ResNet/~/linear']['w'].shape
    (128, 10)
  """

  def __init__(
    self,
    num_classes: int = 1000,
    variant: str = 'resnet50',
    *,
    stochdepth_rate: float = 0.0,
    dropout_rate: float | None = None,
    cross_replica_axis: str | None = None,
    name: str = 'ResNet',
  ):
    """Builds the modules; for the arguments see `BNResNet`.

    Raises:
      ValueError: if the variant is not a key of `VARIANTS_V1`.
    """
    super().__init__(name=name)
    spec = classifier.lookup(VARIANTS_V1, variant, 'ResNet v1')
    self.depth = spec.depth
    self.dropout_rate = spec.dropout if dropout_rate is None else dropout_rate
    norm = functools.partial(
      batch_norm.BatchNorm, cross_replica_axis=cross_replica_axis
    )
    self.initial_conv = batch_norm.conv(spec.stem, 7, 2, name='initial_conv')
    self.initial_bn = norm(name='initial_bn')
    self.blocks = [
      ResBlockV1(
        spec.width[place.stage],
        stride=place.stride,
        is_transition=place.is_transition,
        se_ratio=spec.se_ratio,
        stochdepth_rate=place.stochdepth_rate,
        norm=norm,
      )
      for place in classifier.block_specs(
        spec.depth, nf_resnet.STRIDES, stochdepth_rate
      )
    ]
    self.classifier = hk.Linear(
      num_classes, w_init=hk.initializers.RandomNormal(0, 0.01), name='linear'
    )

  def stem(self, images: jax.Array, is_training: bool) -> jax.Array:
    x = self.initial_bn(self.initial_conv(images), is_training)
    return layers.max_pool(jax.nn.relu(x))

  def head(self, x: jax.Array, is_training: bool) -> jax.Array:
    return x


class ResBlockV1(hk.Module):
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
    super().__init__(name=name)
    self.is_transition = is_transition
    self.stochdepth_rate = stochdepth_rate
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

  def __call__(
    self, x: jax.Array, key: jax.Array | None, positions: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Returns what `batch_norm.PreActivationBlock` does."""
    is_training = key is not None
    shortcut = x
    if self.is_transition:
      shortcut = self.bn_shortcut(self.conv_shortcut(x), is_training)
    out = self.norms[0](self.convs[0](x), is_training)
    for conv, norm in zip(self.convs[1:], self.norms[1:]):
      out = norm(conv(jax.nn.relu(out)), is_training)
    if self.squeeze_excite is not None:
      out = self.squeeze_excite(out) * out
    residual_var = layers.signal_statistics(out)['var']
    out = layers.stochastic_depth(out, self.stochdepth_rate, key, positions)
    return jax.nn.relu(out + shortcut), residual_var
