"""NF-RegNets: normalizer-free RegNets, scaled as EfficientNets are.

Brock et al., "Characterizing signal propagation to close the performance gap in
unnormalized ResNets" (arXiv 2101.08692), appendix, and the released code.
"""

import dataclasses

import haiku as hk
import jax

from nfnet_jax.models import classifier, layers, normalizer_free


@dataclasses.dataclass(frozen=True)
class Variant:
  """What tells one NF-RegNet from another.

  Attributes:
    width: channels of the four stages, before `_WIDTH_FACTOR`.
    depth: blocks of the four stages.
    train_size: pixels a side in training.
    test_size: pixels a side in evaluation.
    dropout: rate on the pooled features.
  """

  width: tuple[int, int, int, int]
  depth: tuple[int, int, int, int]
  train_size: int
  test_size: int
  dropout: float


VARIANTS: dict[str, Variant] = {
  'b0': Variant((48, 104, 208, 440), (1, 3, 6, 6), 192, 224, 0.2),
  'b1': Variant((48, 104, 208, 440), (2, 4, 7, 7), 224, 256, 0.2),
  'b2': Variant((56, 112, 232, 488), (2, 4, 8, 8), 240, 272, 0.3),
  'b3': Variant((56, 128, 248, 528), (2, 5, 9, 9), 288, 320, 0.3),
  'b4': Variant((64, 144, 288, 616), (2, 6, 11, 11), 320, 384, 0.4),
  'b5': Variant((80, 168, 336, 704), (3, 7, 14, 14), 384, 456, 0.4),
  # For CPUs and small images.
  'pico': Variant((16, 24, 32, 48), (1, 2, 1, 1), 32, 32, 0.2),
}

# Of the first block of each stage.
STRIDES = (2, 2, 2, 2)
_WIDTH_FACTOR = 0.75
_EXPANSION = 2.25
_GROUP_SIZE = 8


class NFRegNet(classifier.ImageClassifier):
  """The NF-RegNet image classifier.

  Example:
    >>> import jax.numpy as jnp
    >>> def predict(images):
    ...   return NFRegNet(10, 'pico')(images, is_training=False)
    >>> net = hk.transform_with_state(predict)
    >>> images = jnp.zeros((2, 32, 32, 3))
    >>> params, state = jax.eval_shape(net.init, jax.random.key(0), images)
    >>> params['NF_RegNet/~/linear']['w'].shape
    (104, 10)
  """

  def __init__(
    self,
    num_classes: int = 1000,
    variant: str = 'b0',
    *,
    activation: str = 'silu',
    alpha: float = 0.2,
    stochdepth_rate: float = 0.1,
    dropout_rate: float | None = None,
    name: str = 'NF_RegNet',
  ):
    """Builds the modules.

    Args:
      num_classes: size of the logits.
      variant: a key of `VARIANTS`.
      activation: a key of `layers.ACTIVATIONS`.
      alpha: weight of each residual branch.
      stochdepth_rate: drop rate that the blocks approach linearly, from 0.
      dropout_rate: rate on the pooled features; None takes the variant's.
      name: the root of all parameter paths.

    Raises:
      ValueError: if variant or activation is unknown.
    """
    super().__init__(name=name)
    spec = classifier.lookup(VARIANTS, variant, 'NF-RegNet')
    self.depth = spec.depth
    self.activation = layers.scaled_activation(activation)
    self.dropout_rate = spec.dropout if dropout_rate is None else dropout_rate
    width = [int(channels * _WIDTH_FACTOR) for channels in spec.width]
    self.initial_conv = layers.ScaledWSConv2D(
      width[0], 3, 2, name='initial_conv'
    )
    self.blocks = []
    channels_in = width[0]
    for place, beta in zip(
      classifier.block_specs(spec.depth, STRIDES, stochdepth_rate),
      normalizer_free.betas(spec.depth, alpha),
    ):
      expansion = _EXPANSION if self.blocks else 1
      self.blocks.append(
        NFRegBlock(
          width[place.stage],
          expanded=int(channels_in * expansion),
          stride=place.stride,
          is_transition=place.is_transition,
          activation=self.activation,
          alpha=alpha,
          beta=beta,
          stochdepth_rate=place.stochdepth_rate,
        )
      )
      channels_in = width[place.stage]
    self.final_conv = layers.ScaledWSConv2D(
      int(1280 * channels_in / 440), 1, name='final_conv'
    )
    self.classifier = hk.Linear(
      num_classes, w_init=hk.initializers.Constant(0), name='linear'
    )

  def stem(self, images: jax.Array, is_training: bool) -> jax.Array:
    return self.initial_conv(images)

  def head(self, x: jax.Array, is_training: bool) -> jax.Array:
    return self.activation(self.final_conv(x))


class NFRegBlock(normalizer_free.NormalizerFreeBlock):
  """NF-RegNet's inverted bottleneck block.

  The branch is 1x1, 3x3 grouped (strided), squeeze-excite and 1x1 with
  activations before the convolutions; the projection is average pooling and
  1x1.
  """

  def __init__(
    self,
    channels: int,
    *,
    expanded: int,
    stride: int,
    name: str = 'nf_block',
    **residual,
  ):
    """Builds the convolutions.

    Args:
      channels: output channels.
      expanded: inner channels, rounded down to whole groups of 8.
      stride: of the 3x3 convolution.
      name: module name.
      **residual: see `normalizer_free.NormalizerFreeBlock`.
    """
    super().__init__(name=name, **residual)
    self.stride = stride
    groups = expanded // _GROUP_SIZE
    inner = groups * _GROUP_SIZE
    conv = layers.ScaledWSConv2D
    self.conv0 = conv(inner, 1, name='conv0')
    self.conv1 = conv(inner, 3, stride, groups, name='conv1')
    self.conv2 = conv(channels, 1, name='conv2')
    if self.is_transition:
      self.conv_shortcut = conv(channels, 1, name='conv_shortcut')
    self.squeeze_excite = layers.SqueezeExcite(
      inner, inner // 2, name='squeeze_excite'
    )

  def branch(self, x: jax.Array) -> jax.Array:
    x = self.conv0(x)
    x = self.conv1(self.activation(x))
    # Gates average 1/2, so 2 restores the variance.
    x = 2 * self.squeeze_excite(x) * x
    return self.conv2(self.activation(x))

  def project(self, x: jax.Array) -> jax.Array:
    return self.conv_shortcut(normalizer_free.downsample(x, self.stride))
