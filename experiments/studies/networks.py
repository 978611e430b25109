"""Networks of the studies: deeper than `pico`, still small."""

from __future__ import annotations

from nfnet_jax.models import nf_resnet, registry

_DEEP = 'nf_resnet_deep'


class DeepNFResNet(nf_resnet.NFResNet):
  """A normalizer-free ResNet of 24 blocks of three convolutions."""

  variants = {
    'deep': nf_resnet.Variant((6, 6, 6, 6), (16, 32, 64, 128), 8, 32, 32)
  }


def register() -> None:
  """Make the network known by name, unless it is."""
  if _DEEP not in registry.list_models():
    registry.register_model(
      _DEEP, DeepNFResNet, 'deep', train_size=32, test_size=32
    )
