"""FixUp ResNets, which train without normalisation by their initialisation.

Zhang et al., "Fixup Initialization: Residual Learning Without Normalization"
(arXiv 1901.09321), in the form that the authors of NF-ResNets released.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import haiku as hk
import jax

from nfnet_jax.models import (
  batch_norm,
  classifier,
  layers,
  nf_resnet,
  residual,
)


class FixUpResNet(classifier.ImageClassifier):
  """The FixUp ResNet image classifier: post-activation, scalar biases.

  Examples:
    >>> import jax.numpy as jnp
    >>> def predict(images):
    ...   return FixUpResNet(10, 'pico')(images, is_training=False)
    >>> net = hk.transform_with_state(predict)
    >>> images = jnp.zeros((2, 32, 32, 3))
    >>> params, state = jax.eval_shape(net.init, jax.random.key(0), images)
    >>> params['FixUp_ResNet']['bias1'].shape
    ()
  """

  variants: ClassVar[Mapping[str, nf_resnet.Variant]] = nf_resnet.VARIANTS

  def __init__(
    self,
    num_classes: int = 1000,
    variant: str = '50',
    *,
    stochdepth_rate: float = 0.1,
    dropout_rate: float | None = None,
    name: str = 'FixUp_ResNet',
  ):
    """Create the modules.

    Args:
      num_classes: Size of the logits.
      variant: A key of `nf_resnet.VARIANTS`.
      stochdepth_rate: Stochastic depth rate, which grows linearly from 0 with
        the block's index.
      dropout_rate: Dropout rate on the pooled features; None takes the
        variant's.
      name: Root of all parameter paths.

    Raises:
      ValueError: if the variant is unknown.
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
    self.initial_conv = hk.Conv2D(
      row.stem, 7, 2, with_bias=False, name='initial_conv'
    )
    specs = residual.block_specs(row.depth, nf_resnet.STRIDES, stochdepth_rate)
    self.blocks = [
      FixUpBlock(
        row.width[spec.stage],
        stride=spec.stride,
        is_transition=spec.is_transition,
        stochdepth_rate=spec.stochdepth_rate,
        num_blocks=len(specs),
      )
      for spec in specs
    ]

  def stem(self, images: jax.Array, is_training: bool) -> jax.Array:
    """Apply a strided 7x7 convolution, a bias, ReLU and max pooling."""
    x = _add_bias(self.initial_conv(images), 'bias1')
    return layers.max_pool(jax.nn.relu(x))

  def head(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Add a bias."""
    return _add_bias(x, 'bias2')


class FixUpBlock(residual.ResidualBlock):
  """FixUp's bottleneck block `relu(shortcut + scale * branch + bias)`.

  The branch is 1x1, 3x3 (strided) and 1x1 with a scalar bias before and after
  each convolution and ReLU between. Its last convolution starts at 0.
  """

  def __init__(
    self,
    channels: int,
    *,
    stride: int,
    is_transition: bool,
    stochdepth_rate: float,
    num_blocks: int,
    name: str = 'res_block',
  ):
    """Create the convolutions.

    Args:
      channels: output channels, four times those of the bottleneck.
      stride: of the 3x3 convolution and the projection.
      is_transition: whether the shortcut is projected.
      stochdepth_rate: probability of dropping the branch in training.
      num_blocks: of the network, from which the kernels' scale follows.
      name: module name.
    """
    # The base class projects always: every shortcut has the first bias.
    super().__init__(
      is_transition=True, stochdepth_rate=stochdepth_rate, name=name
    )
    inner = channels // 4
    # L^(-1 / (2 m - 2)) with m = 3 convolutions per branch.
    scale = num_blocks**-0.25
    conv, normal = batch_norm.conv, hk.initializers.RandomNormal
    first = normal((2 / inner) ** 0.5 * scale)
    middle = normal((2 / (9 * inner)) ** 0.5 * scale)
    zeros = hk.initializers.Constant(0)
    self.convs = [
      conv(inner, 1, w_init=first, name='conv0'),
      conv(inner, 3, stride, w_init=middle, name='conv1'),
      conv(channels, 1, w_init=zeros, name='conv2'),
    ]
    self.conv_shortcut = None
    if is_transition:
      init = normal((2 / channels) ** 0.5)
      self.conv_shortcut = conv(
        channels, 1, stride, w_init=init, name='conv_shortcut'
      )

  def preactivate(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Add the first bias."""
    return _add_bias(x, 'bias1a')

  def project(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Convolve with stride in a transition block."""
    return x if self.conv_shortcut is None else self.conv_shortcut(x)

  def branch(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Apply the convolutions, with biases around them, and the scale."""
    first, middle, last = self.convs
    x = jax.nn.relu(_add_bias(first(x), 'bias1b'))
    x = jax.nn.relu(_add_bias(middle(_add_bias(x, 'bias2a')), 'bias2b'))
    x = last(_add_bias(x, 'bias3a'))
    init = hk.initializers.Constant(1)
    return _add_bias(
      x * hk.get_parameter('scale', (), x.dtype, init=init), 'bias3b'
    )

  def merge(self, out: jax.Array, shortcut: jax.Array) -> jax.Array:
    """Add the shortcut and apply the activation."""
    return jax.nn.relu(out + shortcut)


def _add_bias(x: jax.Array, name: str) -> jax.Array:
  """Add a learnt scalar of the current module, which starts at 0."""
  init = hk.initializers.Constant(0)
  return x + hk.get_parameter(name, (), x.dtype, init=init)
