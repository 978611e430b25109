"""NF-ResNets: pre-activation ResNets without normalisation layers.

Brock et al., "Characterizing signal propagation to close the performance gap in
unnormalized ResNets" (arXiv 2101.08692); arXiv 2102.06171, section 4, trains
them with adaptive gradient clipping.
"""

import dataclasses

import haiku as hk
import jax

from nfnet_jax.models import classifier, layers, normalizer_free


@dataclasses.dataclass(frozen=True)
class Variant:
  """What tells one pre-activation ResNet from another.

  Attributes:
    depth: blocks of the four stages.
    width: output channels of the four stages.
    stem: output channels of the first convolution.
    train_size: pixels a side in training.
    test_size: pixels a side in evaluation.
    dropout: rate on the pooled features.
  """

  depth: tuple[int, int, int, int]
  width: tuple[int, int, int, int] = (256, 512, 1024, 2048)
  stem: int = 64
  train_size: int = 224
  test_size: int = 224
  dropout: float = 0.0


# Of the first block of each stage.
STRIDES = (1, 2, 2, 2)

VARIANTS: dict[str, Variant] = {
  '50': Variant((3, 4, 6, 3)),
  '101': Variant((3, 4, 23, 3)),
  '152': Variant((3, 8, 36, 3)),
  '200': Variant((3, 24, 36, 3)),
  '288': Variant((24, 24, 24, 24)),
  '600': Variant((50, 50, 50, 50)),
  # For CPUs and small images.
  'pico': Variant((1, 2, 1, 1), (16, 32, 64, 128), 8, 32, 32),
}


class NFResNet(classifier.ImageClassifier):
  """The NF-ResNet image classifier.

  Example:
    >>> import jax.numpy as jnp
    >>> def predict(images):
    ...   return NFResNet(10, 'pico')(images, is_training=False)
    >>> net = hk.transform_with_state(predict)
    >>> images = jnp.zeros((2, 32, 32, 3))
    >>> params, state = jax.eval_shape(net.init, jax.random.key(0), images)
    >>> params['NF_ResNet/~/linear']['w'].shape
    (128, 10)
  """

  def __init__(
    self,
    num_classes: int = 1000,
    variant: str = '50',
    *,
    activation: str = 'relu',
    alpha: float = 0.2,
    se_ratio: float = 0.0,
    skip_gain: float = 0.0,
    stochdepth_rate: float = 0.1,
    dropout_rate: float | None = None,
    name: str = 'NF_ResNet',
  ):
    """Builds the modules.

    Args:
      num_classes: size of the logits.
      variant: a key of `VARIANTS`.
      activation: a key of `layers.ACTIVATIONS`.
      alpha: weight of each residual branch.
      se_ratio: hidden units of squeeze-excite per channel, such as 0.25; 0 for
        none.
      skip_gain: initial value of the learnt gain of each branch; 1 shows the
        signal propagation that the paper plots.
      stochdepth_rate: drop rate that the blocks approach linearly, from 0.
      dropout_rate: rate on the pooled features; None takes the variant's.
      name: the root of all parameter paths.

    Raises:
      ValueError: if variant or activation is unknown.
    """
    super().__init__(name=name)
    spec = classifier.lookup(VARIANTS, variant, 'NF-ResNet')
    self.depth = spec.depth
    self.activation = layers.scaled_activation(activation)
    self.dropout_rate = spec.dropout if dropout_rate is None else dropout_rate
    self.initial_conv = layers.ScaledWSConv2D(
      spec.stem, 7, 2, name='initial_conv'
    )
    self.blocks = [
      NFResBlock(
        spec.width[place.stage],
        stride=place.stride,
        se_ratio=se_ratio,
        is_transition=place.is_transition,
        activation=self.activation,
        alpha=alpha,
        beta=beta,
        stochdepth_rate=place.stochdepth_rate,
        skip_gain=skip_gain,
      )
      for place, beta in zip(
        classifier.block_specs(spec.depth, STRIDES, stochdepth_rate),
        normalizer_free.betas(spec.depth, alpha),
      )
    ]
    self.classifier = hk.Linear(
      num_classes, w_init=hk.initializers.Constant(0), name='linear'
    )

  def stem(self, images: jax.Array, is_training: bool) -> jax.Array:
    return layers.max_pool(self.initial_conv(images))

  def head(self, x: jax.Array, is_training: bool) -> jax.Array:
    return self.activation(x)


class NFResBlock(normalizer_free.NormalizerFreeBlock):
  """NF-ResNet's bottleneck block.

  The branch is 1x1, 3x3 (strided), 1x1 with activations between, and optionally
  squeeze-excite; the projection is a strided 1x1, without pooling.
  """

  def __init__(
    self,
    channels: int,
    *,
    stride: int,
    se_ratio: float = 0.0,
    name: str = 'nf_res_block',
    **residual,
  ):
    """Builds the convolutions.

    Args:
      channels: output channels, four times those of the bottleneck.
      stride: of the 3x3 convolution and the projection.
      se_ratio: hidden units of squeeze-excite per channel; 0 for none.
      name: module name.
      **residual: see `normalizer_free.NormalizerFreeBlock`.
    """
    super().__init__(name=name, **residual)
    inner = channels // 4
    conv = layers.ScaledWSConv2D
    self.conv0 = conv(inner, 1, name='conv0')
    self.conv1 = conv(inner, 3, stride, name='conv1')
    self.conv2 = conv(channels, 1, name='conv2')
    if self.is_transition:
      self.conv_shortcut = conv(channels, 1, stride, name='conv_shortcut')
    self.squeeze_excite = layers.optional_squeeze_excite(channels, se_ratio)

  def branch(self, x: jax.Array) -> jax.Array:
    x = self.conv0(x)
    x = self.conv1(self.activation(x))
    x = self.conv2(self.activation(x))
    if self.squeeze_excite is None:
      return x
    # Gates average 1/2, so 2 restores the variance.
    return 2 * self.squeeze_excite(x) * x

  def project(self, x: jax.Array) -> jax.Array:
    return self.conv_shortcut(x)
