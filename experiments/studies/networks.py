"""Networks of the studies: deeper than `pico`, still small."""

from __future__ import annotations

from nfnet_jax.models import bn_resnet, nf_resnet, registry

# 24 blocks of three convolutions.
_DEEP = nf_resnet.Variant((6, 6, 6, 6), (16, 32, 64, 128), 8, 32, 32)


class DeepNFResNet(nf_resnet.NFResNet):
  """A normalizer-free ResNet of 24 blocks."""

  variants = {'deep': _DEEP}


class DeepBNResNet(bn_resnet.BNResNet):
  """A batch-normalised ResNet of 24 blocks."""

  variants = {'deep': _DEEP}


_FAMILIES = {'nf_resnet_deep': DeepNFResNet, 'bn_resnet_deep': DeepBNResNet}


def register() -> None:
  """Make the networks known by name, unless they are."""
  for name, family in _FAMILIES.items():
    if name not in registry.list_models():
      registry.register_model(name, family, 'deep', train_size=32, test_size=32)
