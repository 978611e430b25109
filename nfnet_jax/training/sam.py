"""Sharpness-aware minimisation (SAM): the perturbation of the weights.

A step takes its gradient at perturbed weights. After Foret et al. (arXiv
2010.01412), in the cheap form of Brock et al. (arXiv 2102.06171, appendix A.4):
each device computes its own ascent step from a share of its examples, and then
the gradient at the perturbed weights from all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Tree = Any


def sub_batch(
  batch: Mapping[str, jax.Array], share: float
) -> dict[str, jax.Array]:
  """Return a share of a batch's examples, evenly spaced.

  Args:
    batch: arrays `[n, ...]` of examples, and scalars, which are unchanged.
    share: share of the examples, in (0, 1]; see `sub_size`.

  Examples:
    >>> sub_batch({'label': np.arange(10)}, 0.2)
    {'label': array([0, 5])}
  """
  # Evenly spaced, as MixUp and CutMix each mix one half of a data shard.
  size = len(batch['label'])
  count = sub_size(size, share)
  chosen = np.arange(count) * size // count
  return {
    name: value[chosen] if jnp.ndim(value) else value
    for name, value in batch.items()
  }


def sub_size(size: int, share: float) -> int:
  """Return the number of examples in a share of `size`, at least 1."""
  return max(1, round(share * size))


def ascend(params: Tree, grads: Tree, rho: float) -> Tree:
  """Move parameters along their gradient by the Euclidean distance `rho`.

  Args:
    params: float32 tree.
    grads: float32 tree of the gradient; its scale has no effect, and a gradient
      of zeros moves nothing.
    rho: Euclidean norm of the perturbation, over all parameters together.

  Examples:
    >>> ascend({'w': jnp.zeros(2)}, {'w': jnp.array([3.0, 4.0])}, rho=0.5)
    {'w': Array([0.3, 0.4], dtype=float32)}
  """
  norm = optax.tree.norm(grads)
  # A NaN norm gives scale 0 as well, but 0 * NaN stays NaN.
  scale = jnp.where(norm > 0, rho / norm, 0)
  return jax.tree.map(lambda p, g: p + scale * g, params, grads)
