"""NF-RegNets: normalizer-free RegNets, scaled as EfficientNets are.

Brock et al., "Characterizing signal propagation to close the performance gap in
unnormalized ResNets" (arXiv 2101.08692), appendix, and the released code.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar

import haiku as hk
import jax

from nfnet_jax.models import (
  classifier,
  layers,
  normalizer_free,
  propagation,
  residual,
)


@dataclasses.dataclass(frozen=True)
class Variant:
  """The sizes of an NF-RegNet; stages go from fine to coarse.

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
  # In the released code only; the paper's table ends at B5.
  'b6': Variant((88, 184, 376, 792), (3, 8, 16, 16), 448, 528, 0.5),
  'b7': Variant((96, 208, 416, 880), (4, 10, 19, 19), 512, 600, 0.5),
  'b8': Variant((104, 232, 456, 968), (4, 11, 22, 22), 600, 672, 0.5),
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

  Examples:
    >>> import jax.numpy as jnp
    >>> def predict(images):
    ...   return NFRegNet(10, 'pico')(images, is_training=False)
    >>> net = hk.transform_with_state(predict)
    >>> images = jnp.zeros((2, 32, 32, 3))
    >>> params, state = jax.eval_shape(net.init, jax.random.key(0), images)
    >>> params['NF_RegNet/~/linear']['w'].shape
    (104, 10)
  """

  variants: ClassVar[Mapping[str, Variant]] = VARIANTS

  def __init__(
    self,
    num_classes: int = 1000,
    variant: str = 'b0',
    *,
    activation: str = 'silu',
    alpha: float = normalizer_free.ALPHA,
    stochdepth_rate: float = 0.1,
    dropout_rate: float | None = None,
    name: str = 'NF_RegNet',
  ):
    """Create the modules.

    Args:
      num_classes: Size of the logits.
      variant: A key of `VARIANTS`.
      activation: Activation function, a key of `layers.ACTIVATIONS`.
      alpha: Weight of each residual branch.
      stochdepth_rate: Stochastic depth rate, which grows linearly from 0 with
        the block's index.
      dropout_rate: Dropout rate on the pooled features; None takes the
        variant's.
      name: Root of all parameter paths.

    Raises:
      ValueError: if variant or activation is unknown.
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
    self.activation = layers.scaled_activation(activation)
    width = [int(channels * _WIDTH_FACTOR) for channels in row.width]
    self.initial_conv = layers.ScaledWSConv2D(
      width[0], 3, 2, name='initial_conv'
    )
    self.blocks: list[NFRegBlock] = []
    channels_in = width[0]
    for spec, beta in zip(
      residual.block_specs(row.depth, STRIDES, stochdepth_rate),
      normalizer_free.betas(row.depth, alpha),
    ):
      expansion = _EXPANSION if self.blocks else 1
      self.blocks.append(
        NFRegBlock(
          width[spec.stage],
          expanded=int(channels_in * expansion),
          stride=spec.stride,
          is_transition=spec.is_transition,
          activation=self.activation,
          alpha=alpha,
          beta=beta,
          stochdepth_rate=spec.stochdepth_rate,
        )
      )
      channels_in = width[spec.stage]
    self.final_conv = layers.ScaledWSConv2D(
      int(1280 * channels_in / 440), 1, name='final_conv'
    )

  @classmethod
  def expected_variance(cls, variant: str) -> list[float]:
    """Return the variance after each block at initialisation."""
    depth = cls.variants[variant].depth
    return propagation.normalizer_free_variance(depth, normalizer_free.ALPHA)

  def stem(self, images: jax.Array, is_training: bool) -> jax.Array:
    """Apply a strided 3x3 convolution."""
    return self.initial_conv(images)

  def head(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Apply a 1x1 convolution and the activation."""
    return self.activation(self.final_conv(x))


class NFRegBlock(normalizer_free.NormalizerFreeBlock):
  """NF-RegNet's inverted bottleneck block.

  The branch is 1x1, 3x3 grouped (strided), squeeze-excite and 1x1 with
  activations before the convolutions. The projection is average pooling and
  1x1.
  """

  squeeze_excite: layers.SqueezeExcite

  def __init__(
    self,
    channels: int,
    *,
    expanded: int,
    stride: int,
    name: str = 'nf_block',
    **options: Any,
  ):
    """Create the convolutions.

    Args:
      channels: output channels.
      expanded: inner channels, rounded down to whole groups of 8.
      stride: of the 3x3 convolution.
      name: module name.
      **options: see `normalizer_free.NormalizerFreeBlock`.
    """
    super().__init__(name=name, **options)
    self.stride = stride
    groups = expanded // _GROUP_SIZE
    inner = groups * _GROUP_SIZE
    conv = layers.ScaledWSConv2D
    self.convs = [
      conv(inner, 1, name='conv0'),
      conv(inner, 3, stride, groups, name='conv1'),
      conv(channels, 1, name='conv2'),
    ]
    if self.is_transition:
      self.conv_shortcut = conv(channels, 1, name='conv_shortcut')
    self.squeeze_excite = layers.SqueezeExcite(
      inner, inner // 2, name='squeeze_excite'
    )

  def branch(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Apply the convolutions, with squeeze-excite before the last one."""
    first, middle, last = self.convs
    x = middle(self.activation(first(x)))
    # Gates average 1/2, so 2 restores the variance.
    x = 2 * self.squeeze_excite(x) * x
    return last(self.activation(x))

  def project(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Pool and convolve."""
    return self.conv_shortcut(normalizer_free.downsample(x, self.stride))
