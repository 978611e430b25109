"""Networks of the studies: deeper than `pico`, or without some of the parts."""

from __future__ import annotations

import dataclasses

import jax

from nfnet_jax.models import nf_resnet, nfnet, registry

_WIDTH, _STEM = (16, 32, 64, 128), 8
# Of 12 and 24 blocks of three convolutions.
_DEEP = {
  '38': nf_resnet.Variant((3, 3, 3, 3), _WIDTH, _STEM, 32, 32),
  'deep': nf_resnet.Variant((6, 6, 6, 6), _WIDTH, _STEM, 32, 32),
}
_NANO = nfnet.VARIANTS['nano']


class DeepNFResNet(nf_resnet.NFResNet):
  """A narrow normalizer-free ResNet."""

  variants = _DEEP


class NFNetParts(nfnet.NFNet):
  """NFNet-nano without some of its parts.

  It cannot be computed with fused blocks.
  """

  variants = {
    'nano': _NANO,
    'nano_single': dataclasses.replace(_NANO, spatial_convs=1),
  }

  def __init__(
    self,
    num_classes: int = 1000,
    variant: str = 'nano',
    *,
    stochdepth_rate: float = 0.25,
    dropout_rate: float | None = None,
    gamma: bool = True,
    branch_gain: bool = True,
    squeeze_excite: bool = True,
    fast_convs: bool = False,
    name: str = 'NFNet',
  ):
    """Create the modules.

    Args:
      num_classes: See `nfnet.NFNet`.
      variant: A key of `variants`.
      stochdepth_rate: See `nfnet.NFNet`.
      dropout_rate: See `nfnet.NFNet`.
      gamma: Scale the activations.
      branch_gain: Multiply each branch by a learnt gain that starts at 0.
      squeeze_excite: Use squeeze-excite.
      fast_convs: See `nfnet.NFNet`.
      name: Root of all parameter paths.
    """
    super().__init__(
      num_classes,
      variant,
      stochdepth_rate=stochdepth_rate,
      dropout_rate=dropout_rate,
      fast_convs=fast_convs,
      name=name,
    )
    if not gamma:
      self.activation = jax.nn.gelu
    for block in self.blocks:
      block.activation = self.activation
      if not branch_gain:
        block.gain = lambda dtype: 1.0
      if not squeeze_excite:
        block.squeeze_excite = None


_NETWORKS = (
  ('nf_resnet38', DeepNFResNet, '38'),
  ('nf_resnet_deep', DeepNFResNet, 'deep'),
  ('nfnet_parts_nano', NFNetParts, 'nano'),
  ('nfnet_parts_nano_single', NFNetParts, 'nano_single'),
)


def register() -> None:
  """Make the networks known by name, unless they are."""
  for name, family, variant in _NETWORKS:
    if name not in registry.list_models():
      registry.register_model(
        name, family, variant, train_size=32, test_size=32
      )


def unregister() -> None:
  """Remove what `register` added."""
  for name, _, _ in _NETWORKS:
    registry.unregister_model(name)
