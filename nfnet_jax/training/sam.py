"""Sharpness-aware minimisation: the weights at which a step takes its gradient.

After Foret et al. (arXiv 2010.01412), in the cheap form of Brock et al. (arXiv
2102.06171, appendix A.4): each device climbs by the gradient of a share of its
own examples, by itself, and descends from there on all of them.
"""

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
  """Returns a share of a batch's examples, evenly spread over it.

  Args:
    batch: arrays `[n, ...]` of examples, and scalars, which stay.
    share: in (0, 1]; see `sub_size`.

  Example:
    >>> sub_batch({'label': np.arange(10)}, 0.2)
    {'label': array([0, 5])}
  """
  # Spread, because MixUp and CutMix have half of a shard's examples each.
  size = len(batch['label'])
  count = sub_size(size, share)
  chosen = np.arange(count) * size // count
  return {
    name: value[chosen] if jnp.ndim(value) else value
    for name, value in batch.items()
  }


def sub_size(size: int, share: float) -> int:
  """Rounds a share of some examples to whole ones, at least one."""
  return max(1, round(share * size))


def ascend(params: Tree, grads: Tree, rho: float) -> Tree:
  """Moves parameters uphill by the distance `rho`, over all of them together.

  Args:
    params: float32 tree.
    grads: float32 tree of the gradient; its scale does not count. Zeros move
      nothing.
    rho: Euclidean length of the way.

  Example:
    >>> ascend({'w': jnp.zeros(2)}, {'w': jnp.array([3.0, 4.0])}, rho=0.5)
    {'w': Array([0.3, 0.4], dtype=float32)}
  """
  norm = optax.tree.norm(grads)
  # A NaN is not above 0 either, but stays one: 0 * NaN.
  scale = jnp.where(norm > 0, rho / norm, 0)
  return jax.tree.map(lambda p, g: p + scale * g, params, grads)
