"""Exponential moving average (EMA) of parameters, with warm-up of its decay."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def ema_decay(decay: float, step: jax.Array) -> jax.Array:
  """Return `min(decay, (1 + step) / (10 + step))`.

  Without this warm-up, an EMA with decay 0.99999 would hold its initial values
  for 100,000 steps. The first step, 0, has decay 0.1.
  """
  step = jnp.asarray(step, jnp.float32)
  return jnp.minimum(decay, (1 + step) / (10 + step))


def update_ema(average: Any, values: Any, decay: float, step: jax.Array) -> Any:
  """Return the EMA after the update that made `values`.

  Integers, such as the counters of batch normalisation, are copied.

  Args:
    average: tree of the EMA before the update.
    values: tree of the new values.
    decay: limit of the decay, 0.99999 in the published recipe.
    step: 0-based step that made `values`.

  Source: arXiv 2102.06171, appendix A.1, and the released code.
  """
  rate = ema_decay(decay, step)

  def move(mean: jax.Array, value: jax.Array) -> jax.Array:
    if jnp.issubdtype(value.dtype, jnp.integer):
      return value
    return mean * rate + value * (1 - rate)

  return jax.tree.map(move, average, values)
