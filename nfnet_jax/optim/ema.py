"""Exponential moving average of parameters with a warm-up of its decay."""

import jax
import jax.numpy as jnp


def ema_decay(decay: float, step: jax.Array) -> jax.Array:
  """Returns `min(decay, (1 + step) / (10 + step))`.

  Without the warm-up an average with decay 0.99999 would hold its initial
  values for 100,000 steps. The first step, 0, has decay 0.1.
  """
  step = jnp.asarray(step, jnp.float32)
  return jnp.minimum(decay, (1 + step) / (10 + step))


def update_ema(average, values, decay: float, step: jax.Array):
  """Moves every leaf of `average` towards `values`, taken after the update.

  Integers, such as the counters of batch normalisation, are copied.

  Args:
    average: tree of the running average.
    values: tree of the new values.
    decay: the limit of the decay, 0.99999 in the published recipe.
    step: 0-based step that made `values`.

  Source: arXiv 2102.06171, appendix A.1, and the released code.
  """
  rate = ema_decay(decay, step)

  def move(mean: jax.Array, value: jax.Array) -> jax.Array:
    if jnp.issubdtype(value.dtype, jnp.integer):
      return value
    return mean * rate + value * (1 - rate)

  return jax.tree.map(move, average, values)
