"""NF-ResNets: pre-activation ResNets without normalisation layers.

Brock et al., "Characterizing signal propagation to close the performance gap in
unnormalized ResNets" (arXiv 2101.08692); arXiv 2102.06171, section 4, trains
them with adaptive gradient clipping.
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
  """The sizes of a ResNet; stages go from fine to coarse.

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

  Examples:
    >>> import jax.numpy as jnp
    >>> def predict(images):
    ...   return NFResNet(10, 'pico')(images, is_training=False)
    >>> net = hk.transform_with_state(predict)
    >>> images = jnp.zeros((2, 32, 32, 3))
    >>> params, state = jax.eval_shape(net.init, jax.random.key(0), images)
    >>> params['NF_ResNet/~/linear']['w'].shape
    (128, 10)
  """

  variants: ClassVar[Mapping[str, Variant]] = VARIANTS

  def __init__(
    self,
    num_classes: int = 1000,
    variant: str = '50',
    *,
    activation: str = 'relu',
    alpha: float = normalizer_free.ALPHA,
    se_ratio: float = 0.0,
    skip_gain: float = 0.0,
    stochdepth_rate: float = 0.1,
    dropout_rate: float | None = None,
    name: str = 'NF_ResNet',
  ):
    """Create the modules.

    Args:
      num_classes: Size of the logits.
      variant: A key of `VARIANTS`.
      activation: Activation function, a key of `layers.ACTIVATIONS`.
      alpha: Weight of each residual branch.
      se_ratio: Hidden units of squeeze-excite per channel, such as 0.25; 0 for
        no squeeze-excite.
      skip_gain: Initial value of each branch's learnt gain. 1 shows the signal
        propagation that the paper plots.
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
    self.initial_conv = layers.ScaledWSConv2D(
      row.stem, 7, 2, name='initial_conv'
    )
    self.blocks = [
      NFResBlock(
        row.width[spec.stage],
        stride=spec.stride,
        se_ratio=se_ratio,
        is_transition=spec.is_transition,
        activation=self.activation,
        alpha=alpha,
        beta=beta,
        stochdepth_rate=spec.stochdepth_rate,
        skip_gain=skip_gain,
      )
      for spec, beta in zip(
        residual.block_specs(row.depth, STRIDES, stochdepth_rate),
        normalizer_free.betas(row.depth, alpha),
      )
    ]

  @classmethod
  def expected_variance(cls, variant: str) -> list[float]:
    """Return the variance after each block at initialisation."""
    depth = cls.variants[variant].depth
    return propagation.normalizer_free_variance(depth, normalizer_free.ALPHA)

  def stem(self, images: jax.Array, is_training: bool) -> jax.Array:
    """Apply a strided 7x7 convolution and max pooling."""
    return layers.max_pool(self.initial_conv(images))

  def head(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Apply the activation."""
    return self.activation(x)


class NFResBlock(normalizer_free.NormalizerFreeBlock):
  """NF-ResNet's bottleneck block.

  The branch is 1x1, 3x3 (strided), 1x1 with activations between, and optionally
  squeeze-excite. The projection is a strided 1x1, without pooling.
  """

  def __init__(
    self,
    channels: int,
    *,
    stride: int,
    se_ratio: float = 0.0,
    name: str = 'nf_res_block',
    **options: Any,
  ):
    """Create the convolutions.

    Args:
      channels: output channels, four times those of the bottleneck.
      stride: of the 3x3 convolution and the projection.
      se_ratio: hidden units of squeeze-excite per channel; 0 for none.
      name: module name.
      **options: see `normalizer_free.NormalizerFreeBlock`.
    """
    super().__init__(name=name, **options)
    inner = channels // 4
    conv = layers.ScaledWSConv2D
    self.convs = [
      conv(inner, 1, name='conv0'),
      conv(inner, 3, stride, name='conv1'),
      conv(channels, 1, name='conv2'),
    ]
    if self.is_transition:
      self.conv_shortcut = conv(channels, 1, stride, name='conv_shortcut')
    self.squeeze_excite = layers.optional_squeeze_excite(channels, se_ratio)

  def project(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Convolve with stride."""
    return self.conv_shortcut(x)
