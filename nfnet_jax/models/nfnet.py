"""NFNets: residual networks that train deep without normalisation layers.

Brock et al., "High-Performance Large-Scale Image Recognition Without
Normalization" (arXiv 2102.06171), section 4 and appendix C. Where the paper and
the released code differ the code is followed, because it made the published
weights; each place says so.
"""

from collections.abc import Callable
import dataclasses
import functools

import haiku as hk
import jax

from nfnet_jax.models import classifier, layers, normalizer_free
from nfnet_jax.models.fast import blocks, convolutions, stem


@dataclasses.dataclass(frozen=True)
class Variant:
  """What tells one NFNet from another; stages go from fine to coarse.

  Attributes:
    width: output channels of the four stages.
    depth: blocks of the four stages.
    train_size: pixels a side in training.
    test_size: pixels a side in evaluation, about a third more.
    dropout: rate on the pooled features.
    augment_magnitude: RandAugment magnitude of the published recipe.
    group_size: channels a group of the 3x3 convolutions.
    stem: output channels of the first three convolutions; the fourth has half
      of the first stage's width.
    spatial_convs: 3x3 convolutions a block.
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


def _series(suffix: str, width: tuple[int, int, int, int], rows=_SERIES):
  return {
    f'f{index}{suffix}': Variant(width, (n, 2 * n, 6 * n, 3 * n), *rest)
    for index, (n, *rest) in enumerate(rows)
  }


def _ladder() -> dict[str, Variant]:
  """The way from SE-ResNeXt-D to NFNet, F0 to F3; table 2 of the paper.

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
  **_ladder(),
  # The same architecture for CPUs and small images: F0's proportions at an
  # eighth and a sixteenth of the width, shallower.
  'nano': Variant(
    (32, 64, 192, 192), (1, 1, 3, 1), 32, 32, 0.2, 0, 16, (8, 16, 32)
  ),
  'pico': Variant(
    (16, 32, 96, 96), (1, 1, 1, 1), 32, 32, 0.2, 0, 8, (4, 8, 16)
  ),
}


class NFNet(classifier.ImageClassifier):
  """The NFNet image classifier.

  Example:
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

  def __init__(
    self,
    num_classes: int = 1000,
    variant: str = 'f0',
    *,
    activation: str = 'gelu',
    alpha: float = 0.2,
    stochdepth_rate: float = 0.25,
    dropout_rate: float | None = None,
    timm_forward: bool = False,
    fused_blocks: bool = False,
    fast_stem: bool = False,
    fast_convs: bool = False,
    name: str = 'NFNet',
  ):
    """Builds the modules.

    Args:
      num_classes: size of the logits.
      variant: a key of `VARIANTS`.
      activation: a key of `layers.ACTIVATIONS`.
      alpha: weight of each residual branch.
      stochdepth_rate: drop rate that the blocks approach linearly, from 0.
      dropout_rate: rate on the pooled features; None takes the variant's.
      timm_forward: whether to compute as timm's `dm_nfnet_*` do, which differ
        from the published networks: GELU is exact, and weight standardisation
        is `layers.standardize_as_timm`.
      fused_blocks: whether to compute the blocks in fewer passes over their
        activations, and GELU's derivative (see `models.fast.blocks`).
      fast_stem: whether to compute the stem as TPUs do it quickly (see
        `models.fast.stem`), from images or from blocks of them, where the
        images' sides allow it.
      fast_convs: whether to compute convolutions as CPUs do it quickly (see
        `models.fast.convolutions`).
      name: the root of all parameter paths; published trees need 'NFNet'.

    Raises:
      ValueError: if variant or activation is unknown, or the activation has no
        such form.
    """
    super().__init__(name=name)
    spec = classifier.lookup(VARIANTS, variant, 'NFNet')
    if activation in layers.ACROSS_CHANNELS and (fused_blocks or fast_stem):
      raise ValueError(
        f"'{activation}' works across channels, which fused blocks and the "
        'fast stem hold in another order.'
      )
    self.depth = spec.depth
    self.fast_stem = fast_stem
    conv = layers.ScaledWSConv2D
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
    self.dropout_rate = spec.dropout if dropout_rate is None else dropout_rate
    stem_channels = (*spec.stem, spec.width[0] // 2)
    self.stem_convs = [
      conv(channels, 3, stride, name=f'stem_conv{i}')
      for i, (channels, stride) in enumerate(zip(stem_channels, (2, 1, 1, 2)))
    ]
    self.blocks = [
      NFBlock(
        spec.width[place.stage],
        stride=place.stride,
        group_size=spec.group_size,
        spatial_convs=spec.spatial_convs,
        conv=conv,
        fused=fused_blocks,
        is_transition=place.is_transition,
        activation=self.activation,
        alpha=alpha,
        beta=beta,
        stochdepth_rate=place.stochdepth_rate,
      )
      for place, beta in zip(
        classifier.block_specs(spec.depth, STRIDES, stochdepth_rate),
        normalizer_free.betas(spec.depth, alpha),
      )
    ]
    self.final_conv = conv(2 * spec.width[-1], 1, name='final_conv')
    self.classifier = hk.Linear(
      num_classes,
      w_init=hk.initializers.RandomNormal(0, 0.01),
      name='linear',
    )

  def stem(self, images: jax.Array, is_training: bool) -> jax.Array:
    if self.fast_stem and stem.fits(images):
      return stem.stem(images, self.stem_convs, self.activation)
    x = self.stem_convs[0](images)
    for conv in self.stem_convs[1:]:
      x = conv(self.activation(x))
    return x

  def head(self, x: jax.Array, is_training: bool) -> jax.Array:
    return self.activation(self.final_conv(x))


class NFBlock(normalizer_free.NormalizerFreeBlock):
  """NFNet's bottleneck block.

  The branch is 1x1, 3x3 grouped (strided), 3x3 grouped, 1x1 with activations
  between, and squeeze-excite; the projection is average pooling and 1x1.
  """

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
    **residual,
  ):
    """Builds the convolutions.

    Args:
      channels: output channels, twice those of the bottleneck.
      stride: of the first 3x3 convolution.
      group_size: channels a group of the 3x3 convolutions.
      spatial_convs: how many 3x3 convolutions.
      conv: makes a convolution.
      fused: whether to compute it in fewer passes; see `models.fast.blocks`.
      name: module name.
      **residual: see `normalizer_free.NormalizerFreeBlock`.
    """
    super().__init__(name=name, **residual)
    self.stride = stride
    self.fused = fused
    # Whole groups only: in the "+" variants' first stage this makes 128
    # channels of 192, where the paper's own counts keep 192.
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
    if self.fused:
      return blocks.run_block(self, x, key, positions)
    return super().__call__(x, key, positions)

  def branch(self, x: jax.Array) -> jax.Array:
    x = self.convs[0](x)
    for conv in self.convs[1:]:
      x = conv(self.activation(x))
    # Gates average 1/2, so 2 restores the variance.
    return 2 * self.squeeze_excite(x) * x

  def project(self, x: jax.Array) -> jax.Array:
    return self.conv_shortcut(normalizer_free.downsample(x, self.stride))
