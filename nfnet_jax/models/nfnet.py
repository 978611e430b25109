"""NFNets: residual networks that train deep without normalisation layers.

Brock et al., "High-Performance Large-Scale Image Recognition Without
Normalization" (arXiv 2102.06171), section 4 and appendix C. Where the paper and
the released code differ, this follows the code, which trained the published
weights; comments mark these differences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
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
from nfnet_jax.models.fast import blocks, convolutions, stem


@dataclasses.dataclass(frozen=True)
class Variant:
  """The sizes of an NFNet; stages go from fine to coarse.

  Attributes:
    width: output channels of the four stages.
    depth: blocks of the four stages.
    train_size: pixels a side in training.
    test_size: pixels a side in evaluation, about a third more.
    dropout: rate on the pooled features.
    augment_magnitude: RandAugment magnitude of the published recipe.
    group_size: channels per group of the 3x3 convolutions.
    stem: output channels of the first three convolutions; the fourth has half
      of the first stage's width.
    spatial_convs: 3x3 convolutions per block.
  """

  width: tuple[int, int, int, int]
  depth: tuple[int, int, int, int]
  train_size: int
  test_size: int
  dropout: float
  augment_magnitude: int = 0
  group_size: int = 128
  stem: tuple[int, int, int] = (16, 32, 64)
  spatial_convs: int = 2


# Of the first block of each stage.
STRIDES = (1, 2, 2, 2)

# (blocks in units of 1, 2, 6, 3), train px, test px, dropout, magnitude.
_SERIES = (
  (1, 192, 256, 0.2, 5),
  (2, 224, 320, 0.3, 10),
  (3, 256, 352, 0.4, 10),
  (4, 320, 416, 0.4, 15),
  (5, 384, 512, 0.5, 15),
  (6, 416, 544, 0.5, 15),
  (7, 448, 576, 0.5, 15),
  (8, 480, 608, 0.5, 15),
)
_WIDTH = (256, 512, 1536, 1536)
_DEFAULT_WIDTH = (256, 512, 1024, 2048)


def _series(
  suffix: str,
  width: tuple[int, int, int, int],
  rows: tuple[tuple[int, int, int, float, int], ...] = _SERIES,
) -> dict[str, Variant]:
  return {
    f'f{index}{suffix}': Variant(
      width, (n, 2 * n, 6 * n, 3 * n), train, test, dropout, magnitude
    )
    for index, (n, train, test, dropout, magnitude) in enumerate(rows)
  }


def _ablation() -> dict[str, Variant]:
  """Return the ablation from SE-ResNeXt-D to NFNet, F0 to F3, of table 2.

  The baseline is a normalizer-free SE-ResNeXt-D with GELU, groups of 128
  channels and NFNet's depths. The paper trains it, and the same with modified
  widths, without RandAugment.
  """
  rows = _SERIES[:4]
  single = {
    **_series('_baseline', _DEFAULT_WIDTH, rows),
    **_series('_modified_width', _WIDTH, rows),
  }
  return {
    **{
      name: dataclasses.replace(row, spatial_convs=1, augment_magnitude=0)
      for name, row in single.items()
    },
    **_series('_default_width', _DEFAULT_WIDTH, rows),
  }


VARIANTS: dict[str, Variant] = {
  **_series('', _WIDTH),
  **_series('_plus', (384, 768, 2048, 2048)),
  **_ablation(),
  # The same architecture for CPUs and small images: F0's proportions at an
  # eighth and a sixteenth of the width, shallower.
  'nano': Variant(
    (32, 64, 192, 192), (1, 1, 3, 1), 32, 32, 0.2, 0, 16, (8, 16, 32)
  ),
  'pico': Variant(
    (16, 32, 96, 96), (1, 1, 1, 1), 32, 32, 0.2, 0, 8, (4, 8, 16)
  ),
}


# ImageNet top-1 in percent. F6 was trained with SAM, F0 to F5 without. The
# baseline and modified-width rows are without MixUp, CutMix and RandAugment,
# the others with all of them.
PUBLISHED_TOP1 = {
  'arXiv 2102.06171, table 3': {
    'f0': 83.6,
    'f1': 84.7,
    'f2': 85.1,
    'f3': 85.7,
    'f4': 85.9,
    'f5': 86.0,
    'f6': 86.5,
  },
  'arXiv 2102.06171, table 2': {
    'f0_baseline': 80.4,
    'f1_baseline': 81.7,
    'f2_baseline': 82.0,
    'f3_baseline': 82.3,
    'f0_modified_width': 80.9,
    'f1_modified_width': 81.8,
    'f2_modified_width': 82.0,
    'f3_modified_width': 82.3,
    'f0_default_width': 83.1,
    'f1_default_width': 84.5,
    'f2_default_width': 85.0,
    'f3_default_width': 85.5,
  },
}


class NFNet(classifier.ImageClassifier):
  """The NFNet image classifier.

  Examples:
    >>> import jax.numpy as jnp
    >>> def predict(images):
    ...   return NFNet(10, 'pico')(images, is_training=False)
    >>> net = hk.transform_with_state(predict)
    >>> images = jnp.zeros((2, 32, 32, 3))
    >>> params, state = jax.eval_shape(net.init, jax.random.key(0), images)
    >>> logits, _ = jax.eval_shape(net.apply, params, state, None, images)
    >>> logits.shape
    (2, 10)
  """

  variants: ClassVar[Mapping[str, Variant]] = VARIANTS
  eval_crop = 'squash'
  published_top1 = PUBLISHED_TOP1

  def __init__(
    self,
    num_classes: int = 1000,
    variant: str = 'f0',
    *,
    activation: str = 'gelu',
    alpha: float = normalizer_free.ALPHA,
    stochdepth_rate: float = 0.25,
    dropout_rate: float | None = None,
    timm_forward: bool = False,
    fused_blocks: bool = False,
    fast_stem: bool = False,
    fast_convs: bool = False,
    name: str = 'NFNet',
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
      timm_forward: Compute as timm's `dm_nfnet_*` do. They differ from the
        published networks: GELU is exact, and weight standardisation is
        `layers.standardize_as_timm`.
      fused_blocks: Compute blocks in fewer passes over their activations; see
        `models.fast.blocks`.
      fast_stem: Compute the stem on blocks of pixels, which suits TPUs; see
        `models.fast.stem`. Takes images or blocks of them, and computes the
        plain stem where blocks do not divide the images' sides.
      fast_convs: Compute convolutions as plain ones and matrix products, which
        suits CPUs; see `models.fast.convolutions`.
      name: Root of all parameter paths; published trees need 'NFNet'.

    Raises:
      ValueError: if variant or activation is unknown, or a fast path cannot
        compute the activation.
    """
    super().__init__(
      num_classes,
      variant,
      dropout_rate=dropout_rate,
      w_init=hk.initializers.RandomNormal(stddev=0.01),
      name=name,
    )
    row = self.variants[variant]
    if activation in layers.ACROSS_CHANNELS and (fused_blocks or fast_stem):
      raise ValueError(
        f"'{activation}' works across channels, which fused blocks and the "
        'fast stem hold in another order. Leave these fast paths out.'
      )
    self.depth = row.depth
    self.fast_stem = fast_stem
    conv: Callable[..., layers.ScaledWSConv2D] = layers.ScaledWSConv2D
    if timm_forward:
      conv = functools.partial(conv, standardize=layers.standardize_as_timm)
      activation = {'gelu': 'gelu_erf'}.get(activation, activation)
    if fast_convs:
      conv = functools.partial(conv, convolve=convolutions.convolve)
    self.activation = layers.scaled_activation(activation)
    if fused_blocks and activation == 'gelu':
      self.activation = blocks.scaled_gelu
    if fused_blocks and not timm_forward:
      conv = functools.partial(conv, standardize=blocks.standardize)
    stem_channels = (*row.stem, row.width[0] // 2)
    self.stem_convs = [
      conv(channels, 3, stride, name=f'stem_conv{i}')
      for i, (channels, stride) in enumerate(zip(stem_channels, (2, 1, 1, 2)))
    ]
    self.blocks: list[NFBlock] = [
      NFBlock(
        row.width[spec.stage],
        stride=spec.stride,
        group_size=row.group_size,
        spatial_convs=row.spatial_convs,
        conv=conv,
        fused=fused_blocks,
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
    self.final_conv = conv(2 * row.width[-1], 1, name='final_conv')

  @classmethod
  def expected_variance(cls, variant: str) -> list[float]:
    """Return the variance after each block at initialisation."""
    depth = cls.variants[variant].depth
    return propagation.normalizer_free_variance(depth, normalizer_free.ALPHA)

  def stem(self, images: jax.Array, is_training: bool) -> jax.Array:
    """Apply four 3x3 convolutions, of strides 2, 1, 1 and 2."""
    if self.fast_stem and stem.fits(images):
      return stem.stem(images, self.stem_convs, self.activation)
    x = self.stem_convs[0](images)
    for conv in self.stem_convs[1:]:
      x = conv(self.activation(x))
    return x

  def head(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Apply a 1x1 convolution that doubles the channels."""
    return self.activation(self.final_conv(x))


class NFBlock(normalizer_free.NormalizerFreeBlock):
  """NFNet's bottleneck block.

  The branch is 1x1, 3x3 grouped (strided), 3x3 grouped, 1x1 with activations
  between, and squeeze-excite. The projection is average pooling and 1x1.
  """

  squeeze_excite: layers.SqueezeExcite

  def __init__(
    self,
    channels: int,
    *,
    stride: int,
    group_size: int,
    spatial_convs: int = 2,
    conv: Callable[..., layers.ScaledWSConv2D] = layers.ScaledWSConv2D,
    fused: bool = False,
    name: str = 'nf_block',
    **options: Any,
  ):
    """Create the convolutions.

    Args:
      channels: output channels, twice those of the bottleneck.
      stride: of the first 3x3 convolution.
      group_size: channels per group of the 3x3 convolutions.
      spatial_convs: number of 3x3 convolutions, 1 or 2.
      conv: creates a convolution.
      fused: whether `models.fast.blocks` computes the block.
      name: module name.
      **options: see `normalizer_free.NormalizerFreeBlock`.
    """
    super().__init__(name=name, **options)
    self.stride = stride
    self.fused = fused
    # Only whole groups: the first stage of the "+" variants has 128 channels
    # here, but 192 in the paper's counts.
    groups = channels // 2 // group_size
    inner = groups * group_size
    self.convs = [
      conv(inner, 1, name='conv0'),
      conv(inner, 3, stride, groups, name='conv1'),
    ]
    if spatial_convs == 2:
      self.convs.append(conv(inner, 3, 1, groups, name='conv1b'))
    self.convs.append(conv(channels, 1, name='conv2'))
    if self.is_transition:
      self.conv_shortcut = conv(channels, 1, name='conv_shortcut')
    self.squeeze_excite = layers.SqueezeExcite(
      channels, channels // 2, name='squeeze_excite'
    )

  def __call__(
    self, x: jax.Array, key: jax.Array | None, positions: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Return the block's output and the branch's average channel variance."""
    if self.fused:
      return blocks.run_block(self, x, key, positions)
    return super().__call__(x, key, positions)

  def project(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Pool and convolve."""
    return self.conv_shortcut(normalizer_free.downsample(x, self.stride))
