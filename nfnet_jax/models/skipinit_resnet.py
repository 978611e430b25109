"""SkipInit ResNets, whose branches start with a gain of 0.

De and Smith, "Batch Normalization Biases Residual Blocks Towards the Identity
Function in Deep Networks" (arXiv 2002.10444), in the form that the authors of
NF-ResNets released.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import haiku as hk
import jax

from nfnet_jax.models import (
  classifier,
  layers,
  nf_resnet,
  residual,
)


class SkipInitResNet(classifier.ImageClassifier):
  """The SkipInit ResNet image classifier: pre-activation, branch gains from 0.

  Examples:
    >>> import jax.numpy as jnp
    >>> def predict(images):
    ...   return SkipInitResNet(10, 'pico')(images, is_training=False)
    >>> net = hk.transform_with_state(predict)
    >>> images = jnp.zeros((2, 32, 32, 3))
    >>> params, state = jax.eval_shape(net.init, jax.random.key(0), images)
    >>> params['SkipInit_ResNet/~/nf_res_block']['skip_gain'].shape
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
    name: str = 'SkipInit_ResNet',
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
    self.blocks = [
      SkipInitBlock(
        row.width[spec.stage],
        stride=spec.stride,
        is_transition=spec.is_transition,
        stochdepth_rate=spec.stochdepth_rate,
      )
      for spec in residual.block_specs(
        row.depth, nf_resnet.STRIDES, stochdepth_rate
      )
    ]

  def stem(self, images: jax.Array, is_training: bool) -> jax.Array:
    """Apply a strided 7x7 convolution and max pooling."""
    return layers.max_pool(self.initial_conv(images))

  def head(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Apply the activation."""
    return jax.nn.relu(x)


class SkipInitBlock(residual.ResidualBlock):
  """SkipInit's bottleneck block `shortcut + skip_gain * branch`.

  The branch is ReLU and convolution three times: 1x1, 3x3 (strided), 1x1. A
  projection sees the activated input, any other shortcut the raw one.
  """

  def __init__(
    self,
    channels: int,
    *,
    stride: int,
    is_transition: bool,
    stochdepth_rate: float,
    name: str = 'nf_res_block',
  ):
    """Create the convolutions.

    Args:
      channels: output channels, four times those of the bottleneck.
      stride: of the 3x3 convolution and the projection.
      is_transition: whether the shortcut is projected.
      stochdepth_rate: probability of dropping the branch in training.
      name: module name.
    """
    super().__init__(
      is_transition=is_transition, stochdepth_rate=stochdepth_rate, name=name
    )
    inner = channels // 4
    self.convs = [
      hk.Conv2D(inner, 1, name='conv0'),
      hk.Conv2D(inner, 3, stride, name='conv1'),
      hk.Conv2D(channels, 1, name='conv2'),
    ]
    if is_transition:
      self.conv_shortcut = hk.Conv2D(channels, 1, stride, name='conv_shortcut')

  def preactivate(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Apply the activation."""
    return jax.nn.relu(x)

  def project(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Convolve with stride."""
    return self.conv_shortcut(x)

  def branch(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Apply the convolutions, with activations between them."""
    x = self.convs[0](x)
    for conv in self.convs[1:]:
      x = conv(jax.nn.relu(x))
    return x

  def merge(self, out: jax.Array, shortcut: jax.Array) -> jax.Array:
    """Add the scaled branch to the shortcut."""
    init = hk.initializers.Constant(0)
    gain = hk.get_parameter('skip_gain', (), out.dtype, init=init)
    return gain * out + shortcut
