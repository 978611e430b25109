"""NFNets: residual networks that train deep without normalisation layers.

Brock et al., "High-Performance Large-Scale Image Recognition Without
Normalization" (arXiv 2102.06171), section 4 and appendix C. Where the paper and
the released code differ the code is followed, because it made the published
weights; each place says so.
"""

import dataclasses
import math

import haiku as hk
import jax
import jax.numpy as jnp

from nfnet_jax.models import layers


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
  """

  width: tuple[int, int, int, int]
  depth: tuple[int, int, int, int]
  train_size: int
  test_size: int
  dropout: float
  augment_magnitude: int = 0
  group_size: int = 128
  stem: tuple[int, int, int] = (16, 32, 64)


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


def _series(suffix: str, width: tuple[int, int, int, int]):
  return {
    f'f{index}{suffix}': Variant(width, (n, 2 * n, 6 * n, 3 * n), *rest)
    for index, (n, *rest) in enumerate(_SERIES)
  }


VARIANTS: dict[str, Variant] = {
  **_series('', (256, 512, 1536, 1536)),
  **_series('_plus', (384, 768, 2048, 2048)),
  # The same architecture for CPUs and small images: F0's proportions at an
  # eighth and a sixteenth of the width, shallower.
  'nano': Variant(
    (32, 64, 192, 192), (1, 1, 3, 1), 32, 32, 0.2, 0, 16, (8, 16, 32)
  ),
  'pico': Variant(
    (16, 32, 96, 96), (1, 1, 1, 1), 32, 32, 0.2, 0, 8, (4, 8, 16)
  ),
}


class NFNet(hk.Module):
  """The NFNet image classifier.

  Example:
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
      name: the root of all parameter paths; published trees need 'NFNet'.

    Raises:
      ValueError: if variant or activation is unknown.
    """
    super().__init__(name=name)
    if variant not in VARIANTS:
      raise ValueError(
        f"Unknown NFNet variant '{variant}'; known: {', '.join(VARIANTS)}."
      )
    spec = VARIANTS[variant]
    self.activation = layers.scaled_activation(activation)
    self.dropout_rate = spec.dropout if dropout_rate is None else dropout_rate
    stem_channels = (*spec.stem, spec.width[0] // 2)
    self.stem = [
      layers.ScaledWSConv2D(channels, 3, stride, name=f'stem_conv{i}')
      for i, (channels, stride) in enumerate(zip(stem_channels, (2, 1, 1, 2)))
    ]
    self.blocks = []
    total = sum(spec.depth)
    # The standard deviation that the analysis expects at each block's input:
    # every block adds alpha^2, and a transition block starts again from 1.
    expected_std = 1.0
    for width, depth, stride in zip(spec.width, spec.depth, (1, 2, 2, 2)):
      for index in range(depth):
        is_transition = index == 0
        self.blocks.append(
          NFBlock(
            width,
            stride=stride if is_transition else 1,
            is_transition=is_transition,
            group_size=spec.group_size,
            activation=self.activation,
            alpha=alpha,
            beta=1 / expected_std,
            stochdepth_rate=stochdepth_rate * len(self.blocks) / total,
          )
        )
        variance_in = 1.0 if is_transition else expected_std**2
        expected_std = math.sqrt(variance_in + alpha**2)
    self.final_conv = layers.ScaledWSConv2D(
      2 * spec.width[-1], 1, name='final_conv'
    )
    self.classifier = hk.Linear(
      num_classes,
      w_init=hk.initializers.RandomNormal(0, 0.01),
      name='linear',
    )

  def __call__(
    self,
    images: jax.Array,
    is_training: bool,
    positions: jax.Array | None = None,
  ) -> jax.Array:
    """Maps normalised images `[N, H, W, 3]` to logits `[N, num_classes]`.

    Args:
      images: float images, normalised a channel.
      is_training: whether stochastic depth and dropout act. Only then is a
        random key drawn.
      positions: `[N]` each example's place in the global batch, from which its
        random draws derive; 0 to N - 1 by default.
    """
    return self.endpoints(images, is_training, positions)['logits']

  def endpoints(
    self,
    images: jax.Array,
    is_training: bool,
    positions: jax.Array | None = None,
  ) -> dict[str, jax.Array | dict[str, jax.Array]]:
    """Runs the network and returns what is worth looking at on the way.

    Returns:
      A dict with `block_0`, `block_1`, ... (each a dict of `sq_mean` and `var`
      of the block's output and `residual_var` of its branch before the skip
      gain), `features [N, 2 * width]` (pooled, before dropout) and `logits`.
    """
    key = hk.next_rng_key() if is_training else None
    if positions is None:
      positions = jnp.arange(images.shape[0])
    outputs = {}
    x = images
    for conv in self.stem[:-1]:
      x = self.activation(conv(x))
    x = self.stem[-1](x)
    for index, block in enumerate(self.blocks):
      block_key = jax.random.fold_in(key, index) if is_training else None
      x, residual_var = block(x, block_key, positions)
      outputs[f'block_{index}'] = {
        **layers.signal_statistics(x),
        'residual_var': residual_var,
      }
    x = self.activation(self.final_conv(x))
    features = jnp.mean(x, axis=(1, 2))
    outputs['features'] = features
    if is_training:
      dropout_key = jax.random.fold_in(key, len(self.blocks))
      features = layers.dropout(
        features, self.dropout_rate, dropout_key, positions
      )
    outputs['logits'] = self.classifier(features)
    return outputs


class NFBlock(hk.Module):
  """The bottleneck residual block `x + alpha * skip_gain * branch(x)`.

  The branch is activation and beta, 1x1, 3x3 grouped (strided), 3x3 grouped,
  1x1, squeeze-excite, stochastic depth, with activations between. The paper
  writes f(x / std); the code computes f(x) / std, which differs for GELU.
  """

  def __init__(
    self,
    channels: int,
    *,
    stride: int,
    is_transition: bool,
    group_size: int,
    activation: layers.Activation,
    alpha: float,
    beta: float,
    stochdepth_rate: float,
    name: str = 'nf_block',
  ):
    super().__init__(name=name)
    self.stride = stride
    self.activation = activation
    self.alpha = alpha
    self.beta = beta
    self.stochdepth_rate = stochdepth_rate
    # Whole groups only: in the "+" variants' first stage this makes 128
    # channels of 192, where the paper's own counts keep 192.
    groups = channels // 2 // group_size
    inner = groups * group_size
    conv = layers.ScaledWSConv2D
    self.conv0 = conv(inner, 1, name='conv0')
    self.conv1 = conv(inner, 3, stride, groups, name='conv1')
    self.conv1b = conv(inner, 3, 1, groups, name='conv1b')
    self.conv2 = conv(channels, 1, name='conv2')
    self.conv_shortcut = (
      conv(channels, 1, name='conv_shortcut') if is_transition else None
    )
    self.squeeze_excite = layers.SqueezeExcite(
      channels, 0.5, name='squeeze_excite'
    )

  def __call__(
    self, x: jax.Array, key: jax.Array | None, positions: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the block's output and the branch's average channel variance.

    Args:
      x: `[N, H, W, C]`.
      key: random key of this block and step; None in evaluation.
      positions: `[N]`, see `layers.example_keys`.
    """
    out = self.activation(x) * self.beta
    shortcut = x if self.conv_shortcut is None else self._project(out)
    out = self.conv0(out)
    out = self.conv1(self.activation(out))
    out = self.conv1b(self.activation(out))
    out = self.conv2(self.activation(out))
    # Gates average 1/2, so 2 restores the variance.
    out = 2 * self.squeeze_excite(out) * out
    residual_var = layers.signal_statistics(out)['var']
    if key is not None:
      out = layers.stochastic_depth(out, self.stochdepth_rate, key, positions)
    skip_gain = hk.get_parameter('skip_gain', (), out.dtype, init=jnp.zeros)
    return self.alpha * skip_gain * out + shortcut, residual_var

  def _project(self, x: jax.Array) -> jax.Array:
    if self.stride > 1:
      # SAME pooling: windows cut by the border average what they hold. A window
      # larger than the map is summed twice by XLA on CPU (jax 0.10 to 0.12).
      height, width = x.shape[1:3]
      window = (1, min(2, height), min(2, width), 1)
      x = hk.avg_pool(x, window, (1, 2, 2, 1), 'SAME')
    return self.conv_shortcut(x)
