"""The paper's optimiser: AGC, weight decay, Nesterov momentum, a schedule.

Section 5.1 and appendix A.1 of arXiv 2102.06171.
"""

from __future__ import annotations

from collections.abc import Sequence
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nfnet_jax import trees
from nfnet_jax.optim import clipping as clipping_lib
from nfnet_jax.optim import groups as groups_lib


def make_optimizer(
  learning_rate: float | optax.Schedule,
  *,
  momentum: float = 0.9,
  nesterov: bool = True,
  rms_decay: float | None = None,
  weight_decay: float = 2e-5,
  clipping: float | optax.Schedule | None = None,
  clip_by: str = 'unit',
  clip_statistics: str = 'group',
  eps: float = 1e-3,
  trust_coefficient: float | None = None,
  groups: Sequence[groups_lib.Group] = groups_lib.NFNET_GROUPS,
) -> optax.GradientTransformation:
  """Chain clipping, coupled weight decay, momentum and the learning rate.

  The defaults are those of the paper: SGD with Nesterov momentum and AGC.

  Args:
    learning_rate: a float or a schedule, such as `warmup_cosine`.
    momentum: momentum of SGD, without dampening.
    nesterov: whether the momentum is Nesterov's.
    rms_decay: if given, gradients are divided by the root of a running mean of
      their squares with this decay, which turns SGD into RMSProp.
    weight_decay: coefficient of the parameters that are added to the clipped
      gradients, before momentum.
    clipping: bound of the clipping rule, or a schedule of it; None for the
      rule's default (0.01 for AGC), 0 for no clipping.
    clip_by: name of the clipping rule: 'unit' (AGC), 'input_unit', 'layer' or
      'global_norm'; see `optim.clipping.RULES`.
    clip_statistics: what the shares of clipped units are counted for: 'group'
      or 'layer'; see `optim.clipping.STATISTICS`.
    eps: minimum of the weight norm in AGC.
    trust_coefficient: if given, the updates of decayed parameters are scaled
      layer-wise as in LARS.
    groups: which parameters are decayed and which are clipped.

  Returns:
    An `optax.GradientTransformation`; its update needs `params`.

  Raises:
    ValueError: if `clip_by` is unknown; at `init`, if a parameter belongs to no
      group or to several.

  Examples:
    >>> schedule = warmup_cosine(1.6, warmup_steps=1564, total_steps=112_602)
    >>> tx = make_optimizer(schedule)
    >>> params = {'net/conv': {'w': jnp.ones((3, 3, 8, 8))}}
    >>> updates, _ = tx.update(params, tx.init(params), params)
  """

  def is_decayed(tree: Any) -> Any:
    return trees.map_named(
      lambda path, _: groups_lib.group_of(path, groups).decay, tree
    )

  chain = [
    optax.add_decayed_weights(weight_decay, mask=is_decayed),
    optax.trace(decay=momentum, nesterov=nesterov),
    optax.scale_by_learning_rate(learning_rate),
  ]
  if rms_decay is not None:
    # EfficientNets were trained with this eps.
    chain.insert(1, optax.scale_by_rms(rms_decay, eps=1e-3))
  if trust_coefficient is not None:
    rates = optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient)
    chain.insert(1, optax.masked(rates, is_decayed))
  rule = clipping_lib.get_rule(clip_by)
  clipping = rule.default if clipping is None else clipping
  # Neither a schedule nor a traced value is 0.
  if not isinstance(clipping, numbers.Real) or clipping:
    chain.insert(0, rule.make(clipping, eps, groups, clip_statistics))
  return optax.chain(*chain)


# The former name, from when all options were the paper's.
nfnet_sgd = make_optimizer


def warmup_cosine(
  peak: float, warmup_steps: float, total_steps: float, final: float = 0.0
) -> optax.Schedule:
  """Return a schedule with linear warm-up to `peak` and cosine decay.

  It rises from 0 at step 0 to `peak` at `warmup_steps` and falls to `final` at
  `total_steps`. Steps may be fractional, as published: 5 epochs of 1,281,167
  images at batch 4096 are 1563.9 steps.

  Examples:
    >>> schedule = warmup_cosine(1.0, warmup_steps=10, total_steps=110)
    >>> [round(float(schedule(step)), 3) for step in (0, 5, 10, 60, 110)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
  """

  def cosine(step: jax.Array) -> jax.Array:
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1e-9)
    fall = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
    return final + (peak - final) * fall

  return _warm_up(peak, warmup_steps, cosine)


def warmup_step_decay(
  peak: float, warmup_steps: float, factor: float, every_steps: float
) -> optax.Schedule:
  """Return a schedule with linear warm-up to `peak` and step decay.

  The rate is multiplied by `factor` every `every_steps`, counted from step 0,
  as EfficientNets were trained (Tan and Le, arXiv 1905.11946, section 5.2: by
  0.97 every 2.4 epochs).

  Examples:
    >>> schedule = warmup_step_decay(1.0, 2, factor=0.5, every_steps=10)
    >>> [float(schedule(step)) for step in (1, 9, 10, 25)]
    [0.5, 1.0, 0.5, 0.25]
  """
  decay = lambda step: peak * factor ** jnp.floor(step / every_steps)
  return _warm_up(peak, warmup_steps, decay)


def _warm_up(
  peak: float, warmup_steps: float, after: optax.Schedule
) -> optax.Schedule:
  def schedule(step: jax.Array) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    rise = peak * (step / max(warmup_steps, 1e-9))
    return jnp.where(step < warmup_steps, rise, after(step))

  return schedule
