"""Signal propagation: the variance of a network's signal, block by block.

Brock et al., "Characterizing signal propagation to close the performance gap in
unnormalized ResNets" (arXiv 2101.08692), sections 3 and 4. Families return
these in `ImageClassifier.expected_variance`.
"""

from __future__ import annotations

from collections.abc import Sequence
import math

# Variance of a convolution with He initialisation after BN and ReLU.
_HE_RESIDUAL = 1 - 1 / math.pi


def normalizer_free_variance(depth: Sequence[int], alpha: float) -> list[float]:
  """Return the variance expected after every block without normalisation.

  A stage's first block starts from variance 1 and every block adds
  `alpha ** 2`, at initialisation with skip gains of 1.

  Args:
    depth: blocks per stage.
    alpha: weight of each residual branch.

  Examples:
    >>> [round(var, 2) for var in normalizer_free_variance((2, 1), 0.2)]
    [1.04, 1.08, 1.04]
  """
  return _stages(depth, 1.0, alpha**2)


def batch_norm_variance(depth: Sequence[int]) -> list[float]:
  """Return the variance expected after every block of a BN-ReLU-Conv ResNet.

  With He initialisation each branch and each projected shortcut has variance
  1 - 1 / pi.

  Args:
    depth: blocks per stage.

  Examples:
    >>> [round(var, 2) for var in batch_norm_variance((2, 1))]
    [1.36, 2.05, 1.36]
  """
  return _stages(depth, _HE_RESIDUAL, _HE_RESIDUAL)


def _stages(depth: Sequence[int], start: float, added: float) -> list[float]:
  return [
    start + (index + 1) * added for blocks in depth for index in range(blocks)
  ]
