"""The paper's optimiser: AGC, weight decay, Nesterov momentum, a schedule.

Section 5.1 and appendix A.1 of arXiv 2102.06171.
"""

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp
import optax

from nfnet_jax import trees
from nfnet_jax.optim import agc as agc_lib
from nfnet_jax.optim import groups as groups_lib


def nfnet_sgd(
  learning_rate: float | optax.Schedule,
  *,
  momentum: float = 0.9,
  nesterov: bool = True,
  rms_decay: float | None = None,
  weight_decay: float = 2e-5,
  clipping: float | optax.Schedule | None = 0.01,
  clip_by: str = 'unit',
  eps: float = 1e-3,
  trust_coefficient: float | None = None,
  groups: Sequence[groups_lib.Group] = groups_lib.NFNET_GROUPS,
) -> optax.GradientTransformation:
  """Chains AGC, coupled weight decay, Nesterov momentum and the learning rate.

  Args:
    learning_rate: a float or a schedule, such as `warmup_cosine`.
    momentum: of SGD, without dampening.
    nesterov: whether the momentum is Nesterov's.
    rms_decay: divides gradients by the root of a running mean of their squares
      with this decay, which makes SGD RMSProp; None leaves them.
    weight_decay: added to the clipped gradient, before momentum.
    clipping: AGC's ratio, or the norm for 'global_norm'; None clips nothing.
    clip_by: what is bounded: 'unit' for AGC, 'input_unit' for AGC whose units
      are inputs, 'layer' for the ratio of whole layers, 'global_norm' for the
      norm of all gradients together. The paper compares these (section 4.1).
    eps: AGC's floor of the weight norm.
    trust_coefficient: of layer-wise rates as in LARS, for the parameters that
      are decayed; None leaves them out.
    groups: which parameters are decayed and which are clipped.

  Returns:
    An `optax.GradientTransformation`; its update needs `params`.

  Raises:
    ValueError: on an unknown `clip_by`; at `init`, if a parameter lies in no
      group or in two.

  Example:
    >>> schedule = warmup_cosine(1.6, warmup_steps=1564, total_steps=112_602)
    >>> tx = nfnet_sgd(schedule)
    >>> params = {'net/conv': {'w': jnp.ones((3, 3, 8, 8))}}
    >>> updates, _ = tx.update(params, tx.init(params), params)
  """

  def is_decayed(tree):
    return trees.map_named(
      lambda path, _: groups_lib.group_of(path, groups).decay, tree
    )

  chain = [
    optax.add_decayed_weights(weight_decay, mask=is_decayed),
    optax.trace(decay=momentum, nesterov=nesterov),
    optax.scale_by_learning_rate(learning_rate),
  ]
  if rms_decay is not None:
    # The floor that EfficientNets were trained with.
    chain.insert(1, optax.scale_by_rms(rms_decay, eps=1e-3))
  if trust_coefficient is not None:
    rates = optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient)
    chain.insert(1, optax.masked(rates, is_decayed))
  if clipping is not None:
    chain.insert(0, _clip(clip_by, clipping, eps, groups))
  return optax.chain(*chain)


# How `agc` draws units for each way to clip by a ratio.
_UNITS = {
  'unit': 'output_last',
  'input_unit': 'output_first',
  'layer': 'layer',
}
CLIP_BY = (*_UNITS, 'global_norm')


def _clip(
  clip_by: str,
  clipping: float | optax.Schedule,
  eps: float,
  groups: Sequence[groups_lib.Group],
) -> optax.GradientTransformation:
  if clip_by == 'global_norm':
    return optax.clip_by_global_norm(clipping)
  if clip_by not in _UNITS:
    raise ValueError(
      f"Unknown clip_by '{clip_by}'; give one of: {', '.join(CLIP_BY)}."
    )
  return agc_lib.agc(
    clipping,
    eps,
    axes=_UNITS[clip_by],
    exclude=lambda path: not groups_lib.group_of(path, groups).clip,
    group_fn=lambda path: groups_lib.group_of(path, groups).name,
  )


def clipped_units(
  params, groups: Sequence[groups_lib.Group] = groups_lib.NFNET_GROUPS
) -> dict[str, int]:
  """Counts the units of each group that `nfnet_sgd` clips by unit.

  Args:
    params: tree of arrays or shapes.
    groups: which parameters are clipped.

  Example:
    >>> clipped_units({'net/conv': {'w': jnp.ones((3, 3, 8, 16))}})
    {'kernels': 16}
  """
  units = {}
  for path, leaf in trees.named_leaves(params):
    group = groups_lib.group_of(path, groups)
    if group.clip:
      axes = agc_lib.output_last_axes(path, leaf.shape)
      fan_in = math.prod(leaf.shape[axis] for axis in axes)
      units[group.name] = units.get(group.name, 0) + leaf.size // fan_in
  return units


def warmup_cosine(
  peak: float, warmup_steps: float, total_steps: float, final: float = 0.0
) -> optax.Schedule:
  """Rises linearly from 0 to `peak`, then falls to `final` along a cosine.

  Steps may be fractional, as published: 5 epochs of 1,281,167 images at batch
  4096 are 1563.9 steps. Step 0 has rate 0.

  Example:
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
  """Rises linearly from 0 to `peak`, which is multiplied at fixed intervals.

  Intervals are counted from step 0, as EfficientNets were trained (Tan and Le,
  arXiv 1905.11946, section 5.2: by 0.97 every 2.4 epochs).

  Example:
    >>> schedule = warmup_stairs(1.0, 2, factor=0.5, every_steps=10)
    >>> [float(schedule(step)) for step in (1, 9, 10, 25)]
    [0.5, 1.0, 0.5, 0.25]
  """
  stairs = lambda step: peak * factor ** jnp.floor(step / every_steps)
  return _warm_up(peak, warmup_steps, stairs)


def _warm_up(
  peak: float, warmup_steps: float, after: optax.Schedule
) -> optax.Schedule:
  def schedule(step: jax.Array) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    rise = peak * (step / max(warmup_steps, 1e-9))
    return jnp.where(step < warmup_steps, rise, after(step))

  return schedule
