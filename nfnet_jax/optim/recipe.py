"""The paper's optimiser: AGC, weight decay, Nesterov momentum, a schedule.

Section 5.1 and appendix A.1 of arXiv 2102.06171.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from nfnet_jax.optim import agc as agc_lib
from nfnet_jax.optim import groups as groups_lib
from nfnet_jax.optim import paths


def nfnet_sgd(
  learning_rate: float | optax.Schedule,
  *,
  momentum: float = 0.9,
  weight_decay: float = 2e-5,
  clipping: float | optax.Schedule | None = 0.01,
  eps: float = 1e-3,
  groups: Sequence[groups_lib.Group] = groups_lib.NFNET_GROUPS,
) -> optax.GradientTransformation:
  """Chains AGC, coupled weight decay, Nesterov momentum and the learning rate.

  Args:
    learning_rate: a float or a schedule, such as `warmup_cosine`.
    momentum: Nesterov momentum, without dampening.
    weight_decay: added to the clipped gradient, before momentum.
    clipping: AGC's ratio; None leaves AGC out.
    eps: AGC's floor of the weight norm.
    groups: which parameters are decayed and which are clipped.

  Returns:
    An `optax.GradientTransformation`; its update needs `params`.

  Raises:
    ValueError: at `init`, if a parameter lies in no group or in two.

  Example:
    >>> schedule = warmup_cosine(1.6, warmup_steps=1564, total_steps=112_602)
    >>> tx = nfnet_sgd(schedule)
    >>> params = {'net/conv': {'w': jnp.ones((3, 3, 8, 8))}}
    >>> updates, _ = tx.update(params, tx.init(params), params)
  """

  def is_decayed(tree):
    return paths.map_named(
      lambda path, _: groups_lib.group_of(path, groups).decay, tree
    )

  chain = [
    optax.add_decayed_weights(weight_decay, mask=is_decayed),
    optax.trace(decay=momentum, nesterov=True),
    optax.scale_by_learning_rate(learning_rate),
  ]
  if clipping is not None:
    clip = agc_lib.agc(
      clipping,
      eps,
      exclude=lambda path: not groups_lib.group_of(path, groups).clip,
      group_fn=lambda path: groups_lib.group_of(path, groups).name,
    )
    chain.insert(0, clip)
  return optax.chain(*chain)


def warmup_cosine(
  peak: float, warmup_steps: float, total_steps: float
) -> optax.Schedule:
  """Rises linearly from 0 to `peak`, then falls to 0 along a cosine.

  Steps may be fractional, as published: 5 epochs of 1,281,167 images at batch
  4096 are 1563.9 steps. Step 0 has rate 0.

  Example:
    >>> schedule = warmup_cosine(1.0, warmup_steps=10, total_steps=110)
    >>> [round(float(schedule(step)), 3) for step in (0, 5, 10, 60, 110)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
  """

  def schedule(step: jax.Array) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    rise = step / max(warmup_steps, 1e-9)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1e-9)
    fall = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
    return peak * jnp.where(step < warmup_steps, rise, fall)

  return schedule
