"""Signal propagation: how the variance of a network's signal should grow.

Brock et al., "Characterizing signal propagation to close the performance gap in
unnormalized ResNets" (arXiv 2101.08692), sections 3 and 4.
"""

from collections.abc import Sequence
import math

from nfnet_jax.models import bn_resnet, nf_regnet, nf_resnet, nfnet, registry

# Variance of a convolution with He initialisation after BN and ReLU.
_HE_RESIDUAL = 1 - 1 / math.pi


# The normalizer-free families' default weight of a residual branch.
_ALPHA = 0.2


def expected_variance(spec: registry.ModelSpec) -> list[float] | None:
  """Returns the variance expected after every block of a model, if known.

  Example:
    >>> expected = expected_variance(registry.get_spec('nf_resnet50'))
    >>> [round(var, 2) for var in expected[:4]]
    [1.04, 1.08, 1.12, 1.04]
  """
  for family, variants in (
    (nfnet.NFNet, nfnet.VARIANTS),
    (nf_resnet.NFResNet, nf_resnet.VARIANTS),
    (nf_regnet.NFRegNet, nf_regnet.VARIANTS),
  ):
    if spec.family is family:
      return normalizer_free_variance(variants[spec.variant].depth, _ALPHA)
  if spec.family is bn_resnet.BNResNet:
    return batch_norm_variance(bn_resnet.VARIANTS[spec.variant].depth)
  return None


def normalizer_free_variance(depth: Sequence[int], alpha: float) -> list[float]:
  """Returns the variance expected after every block without normalisation.

  A stage's first block starts from variance 1, every block adds `alpha ** 2`:
  at initialisation, with skip gains of 1.

  Args:
    depth: blocks of each stage.
    alpha: weight of each residual branch.

  Example:
    >>> [round(var, 2) for var in normalizer_free_variance((2, 1), 0.2)]
    [1.04, 1.08, 1.04]
  """
  return _stages(depth, 1.0, alpha**2)


def batch_norm_variance(depth: Sequence[int]) -> list[float]:
  """Returns the variance expected after every block of a BN-ReLU-Conv ResNet.

  With He initialisation each branch has variance 1 - 1 / pi, and so has a
  stage's projected shortcut.

  Args:
    depth: blocks of each stage.

  Example:
    >>> [round(var, 2) for var in batch_norm_variance((2, 1))]
    [1.36, 2.05, 1.36]
  """
  return _stages(depth, _HE_RESIDUAL, _HE_RESIDUAL)


def _stages(depth: Sequence[int], start: float, added: float) -> list[float]:
  return [
    start + (index + 1) * added for blocks in depth for index in range(blocks)
  ]
