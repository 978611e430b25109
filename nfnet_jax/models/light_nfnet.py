"""timm's light NFNets: narrower bottlenecks, SiLU, and SE or ECA.

These networks are defined in timm (https://github.com/huggingface/pytorch-image-
models), as `nfnet_l0` and `eca_nfnet_l0` to `eca_nfnet_l3`; there is no paper.
ECA is Wang et al., "ECA-Net" (arXiv 1910.03151).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
from typing import Any, ClassVar

import haiku as hk
import jax
from jax import lax
import jax.numpy as jnp

from nfnet_jax.models import (
  classifier,
  layers,
  normalizer_free,
  residual,
)
from nfnet_jax.models.fast import convolutions
from nfnet_jax.models.nfnet import STRIDES


@dataclasses.dataclass(frozen=True)
class Variant:
  """The sizes of a light NFNet; stages go from fine to coarse.

  Attributes:
    depth: blocks of the four stages.
    train_size: pixels a side in training.
    test_size: pixels a side in evaluation.
    final_channels: output channels of the last convolution.
    attention: 'eca', or 'se' for squeeze-excite.
    dropout: rate on the pooled features. timm has no default; this is the rate
      of the NFNet of the same depth.
    augment_magnitude: RandAugment magnitude of the NFNet of the same depth.
    width: output channels of the four stages.
    group_size: channels per group of the 3x3 convolutions.
    stem: output channels of the first three convolutions.
  """

  depth: tuple[int, int, int, int]
  train_size: int
  test_size: int
  final_channels: int
  attention: str = 'eca'
  dropout: float = 0.2
  augment_magnitude: int = 0
  width: tuple[int, int, int, int] = (256, 512, 1536, 1536)
  group_size: int = 64
  stem: tuple[int, int, int] = (16, 32, 64)


VARIANTS: dict[str, Variant] = {
  'nfnet_l0': Variant((1, 2, 6, 3), 224, 288, 2304, 'se', 0.2, 5),
  'eca_nfnet_l0': Variant((1, 2, 6, 3), 224, 288, 2304, 'eca', 0.2, 5),
  'eca_nfnet_l1': Variant((2, 4, 12, 6), 256, 320, 3072, 'eca', 0.3, 10),
  'eca_nfnet_l2': Variant((3, 6, 18, 9), 320, 384, 3072, 'eca', 0.4, 10),
  'eca_nfnet_l3': Variant((4, 8, 24, 12), 352, 448, 3072, 'eca', 0.4, 15),
  # For CPUs and small images.
  'eca_nfnet_pico': Variant(
    (1, 1, 1, 1),
    32,
    32,
    192,
    width=(16, 32, 96, 96),
    group_size=4,
    stem=(4, 8, 16),
  ),
}

PUBLISHED_TOP1 = {
  "timm's results": {
    'nfnet_l0': 82.75,
    'eca_nfnet_l0': 82.59,
    'eca_nfnet_l1': 84.06,
    'eca_nfnet_l2': 84.71,
  },
}


class LightNFNet(classifier.ImageClassifier):
  """The light NFNet image classifier.

  Gamma multiplies the standardised kernels, where NFNet multiplies the
  activations by it; the first convolution has it too, although no activation
  precedes it. Padding is symmetric. Stochastic depth is NFNet's; timm's is off
  by default.

  Examples:
    >>> def predict(images):
    ...   return LightNFNet(10, 'eca_nfnet_pico')(images, is_training=False)
    >>> net = hk.transform_with_state(predict)
    >>> images = jnp.zeros((2, 32, 32, 3))
    >>> params, state = jax.eval_shape(net.init, jax.random.key(0), images)
    >>> params['LightNFNet/~/nf_block/~/eca']['w'].shape
    (3,)
  """

  variants: ClassVar[Mapping[str, Variant]] = VARIANTS
  eval_margin = 0
  published_top1 = PUBLISHED_TOP1
  standardizes_as_published = False

  def __init__(
    self,
    num_classes: int = 1000,
    variant: str = 'eca_nfnet_l0',
    *,
    activation: str = 'silu',
    alpha: float = normalizer_free.ALPHA,
    stochdepth_rate: float = 0.25,
    dropout_rate: float | None = None,
    fast_convs: bool = False,
    name: str = 'LightNFNet',
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
      fast_convs: Compute convolutions as plain ones and matrix products, which
        suits CPUs; see `models.fast.convolutions`.
      name: Root of all parameter paths.

    Raises:
      ValueError: if variant or activation is unknown.
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
    self.activation, gamma = layers.activation_and_gamma(activation)
    convolve = convolutions.convolve if fast_convs else layers.convolve
    conv = functools.partial(
      layers.ScaledWSConv2D,
      standardize=lambda w, gain: layers.standardize_as_timm(w, gain * gamma),
      convolve=functools.partial(convolve, symmetric=True),
    )
    stem_channels = (*row.stem, row.width[0] // 2)
    self.stem_convs = [
      conv(channels, 3, stride, name=f'stem_conv{i}')
      for i, (channels, stride) in enumerate(zip(stem_channels, (2, 1, 1, 2)))
    ]
    self.blocks: list[LightBlock] = [
      LightBlock(
        row.width[spec.stage],
        stride=spec.stride,
        group_size=row.group_size,
        attention=row.attention,
        conv=conv,
        is_transition=spec.is_transition,
        activation=self.activation,
        alpha=alpha,
        beta=beta,
        stochdepth_rate=spec.stochdepth_rate,
      )
      for spec, beta in zip(
        residual.block_specs(row.depth, STRIDES, stochdepth_rate),
        normalizer_free.betas(row.depth, alpha),
      )
    ]
    self.final_conv = conv(row.final_channels, 1, name='final_conv')

  def stem(self, images: jax.Array, is_training: bool) -> jax.Array:
    """Apply four 3x3 convolutions, of strides 2, 1, 1 and 2."""
    x = self.stem_convs[0](images)
    for conv in self.stem_convs[1:]:
      x = conv(self.activation(x))
    return x

  def head(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Apply a 1x1 convolution and the activation."""
    return self.activation(self.final_conv(x))


class LightBlock(normalizer_free.NormalizerFreeBlock):
  """The bottleneck block of light NFNets, a quarter as wide inside.

  The branch is 1x1, 3x3 grouped (strided), 3x3 grouped, 1x1 with activations
  between, and SE or ECA. It has no skip gain: the gain of its last convolution
  starts at 0. The projection is average pooling and 1x1.
  """

  def __init__(
    self,
    channels: int,
    *,
    stride: int,
    group_size: int,
    attention: str,
    conv: Callable[..., layers.ScaledWSConv2D],
    name: str = 'nf_block',
    **options: Any,
  ):
    """Create the convolutions.

    Args:
      channels: output channels, four times those of the bottleneck.
      stride: of the first 3x3 convolution.
      group_size: channels per group of the 3x3 convolutions.
      attention: 'eca' or 'se'.
      conv: creates a convolution.
      name: module name.
      **options: see `normalizer_free.NormalizerFreeBlock`.
    """
    super().__init__(name=name, **options)
    self.stride = stride
    inner = channels // 4
    groups = inner // group_size
    self.convs = [
      conv(inner, 1, name='conv0'),
      conv(inner, 3, stride, groups, name='conv1'),
      conv(inner, 3, 1, groups, name='conv1b'),
      conv(channels, 1, gain=0.0, name='conv2'),
    ]
    if self.is_transition:
      self.conv_shortcut = conv(channels, 1, name='conv_shortcut')
    if attention == 'eca':
      self.squeeze_excite = EfficientChannelAttention(name='eca')
    else:
      self.squeeze_excite = layers.optional_squeeze_excite(channels, 0.25)

  def project(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Pool and convolve."""
    return self.conv_shortcut(normalizer_free.downsample(x, self.stride))

  def merge(self, out: jax.Array, shortcut: jax.Array) -> jax.Array:
    """Add the scaled branch to the shortcut."""
    return self.alpha * out + shortcut


class EfficientChannelAttention(hk.Module):
  """A convolution over the channels' means that computes their gates.

  Maps `[N, H, W, C]` to gates `[N, 1, 1, C]` in (0, 1). Parameter: `w [k]`,
  with k about half of log2(C) and odd.

  Source: arXiv 1910.03151, section 3.
  """

  def __call__(self, x: jax.Array) -> jax.Array:
    """Compute the gates."""
    size = int((math.log2(x.shape[-1]) + 1) / 2) | 1
    init = hk.initializers.VarianceScaling(1.0, 'fan_in', 'normal')
    w = hk.get_parameter('w', (size,), x.dtype, init=init)
    means = jnp.mean(x, axis=(1, 2))[..., None]
    mixed = lax.conv_general_dilated(
      means, w[:, None, None], (1,), 'SAME', dimension_numbers=_CHANNELS
    )
    return jax.nn.sigmoid(mixed.squeeze(-1))[:, None, None, :]


# Channels take the place of pixels.
_CHANNELS = ('NHC', 'HIO', 'NHC')
