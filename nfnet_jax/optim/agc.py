"""Adaptive gradient clipping (AGC) as an optax gradient transformation.

Brock et al., "High-Performance Large-Scale Image Recognition Without
Normalization" (arXiv 2102.06171), section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nfnet_jax import trees

Axes = tuple[int, ...]
# (path, shape) -> the axes that the norm of one unit is taken over.
UnitRule = Callable[[str, tuple[int, ...]], Axes]


class AGCState(NamedTuple):
  """State of `agc`.

  Attributes:
    count: number of updates so far, for a clipping schedule.
    clipped: fraction of units that the last update clipped, in [0, 1].
    clipped_by_group: the same fraction for each group of `group_fn`.
  """

  # Checkpoints contain this name, although tuples have a method `count`.
  count: jax.Array  # type: ignore[assignment]
  clipped: jax.Array
  clipped_by_group: dict[str, jax.Array]


def output_last_axes(path: str, shape: tuple[int, ...]) -> Axes:
  """Return a unit's axes where the output axis is last: Haiku, Flax, Keras.

  A leaf with at most one axis longer than 1 is one unit. Otherwise the norm is
  taken over axis 0 for linear kernels (IO) and kernels of rank 3 (multi-head
  linear), and over all axes but the last for convolutions (HWIO, DHWIO, ...).
  Up to rank 5 these are the units of `optax.adaptive_grad_clip`.
  """
  del path
  if sum(size != 1 for size in shape) <= 1:
    return tuple(range(len(shape)))
  return (0,) if len(shape) <= 3 else tuple(range(len(shape) - 1))


def output_first_axes(path: str, shape: tuple[int, ...]) -> Axes:
  """Return a unit's axes where the output axis is first: PyTorch, Equinox."""
  del path
  if sum(size != 1 for size in shape) <= 1:
    return tuple(range(len(shape)))
  return tuple(range(1, len(shape)))


def layer_axes(path: str, shape: tuple[int, ...]) -> Axes:
  """Return all axes: each leaf is one unit, which is layer-wise clipping."""
  del path
  return tuple(range(len(shape)))


UNIT_RULES: dict[str, UnitRule] = {
  'output_last': output_last_axes,
  'output_first': output_first_axes,
  'layer': layer_axes,
}


def agc(
  clipping: float | jax.Array | optax.Schedule = 0.01,
  eps: float | jax.Array = 1e-3,
  *,
  axes: str | UnitRule | None = None,
  exclude: trees.PathPredicate | None = None,
  group_fn: Callable[[str], str] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Clip each unit's gradient by the ratio of its norm to its weight's norm.

  A unit is the set of weights that feed one output: a column of a linear kernel
  `[I, O]`, a filter of a convolution kernel `[H, W, I, O]`, or a whole vector
  or scalar. Where `|g| >= clipping * max(|w|, eps)`, the unit's gradient is
  scaled down to that bound; other units pass unchanged, bit for bit. Norms are
  computed in float32 for every dtype, and updates keep their dtype.

  Nothing is excluded by default. The paper never clips the classifier's kernel,
  which `make_optimizer` excludes. Put `agc` before weight decay and momentum.

  Args:
    clipping: largest ratio of gradient norm to weight norm, or an optax
      schedule of it. The paper uses 0.01 at batch 1024 to 4096; larger batches
      need smaller values.
    eps: minimum of the weight norm, so that weights that start at zero can
      move.
    axes: what a unit is: 'output_last' (None, the default: Haiku, Flax),
      'output_first' (PyTorch, Equinox), 'layer' (each leaf is one unit), or a
      function `(path, shape) -> axes` to take each norm over.
    exclude: predicate on '/'-joined paths; gradients of these leaves pass
      unchanged.
    group_fn: path -> group name, for statistics per group.

  Returns:
    An `optax.GradientTransformation` whose state is an `AGCState`. Its update
    needs `params`. Where devices hold different units of the parameters, pass
    `sum_units=function` to the update, and the fractions are those of all
    units: the function turns a device's counts, by path, into the sums over all
    devices. It composes with `optax.chain`, `masked`, `partition`,
    `MultiSteps` and `inject_hyperparams`. The last takes functions for
    schedules, so name them: `static_args=('axes', 'exclude', 'group_fn')`.
    `None` and empty leaves pass.

  Raises:
    ValueError: if an argument is not of the kinds above, `clipping` or `eps` is
      negative, params are missing, a gradient's shape differs from its
      parameter's, or a shape lacks the axes; the message names the leaf.

  Examples:
    >>> tx = optax.chain(agc(0.01), optax.sgd(0.1, momentum=0.9, nesterov=True))
    >>> params = {'w': jnp.ones((3, 2))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> float(state[0].clipped)
    1.0

  Source: arXiv 2102.06171, section 4.1, equation 3, and appendix D. The norm of
  a weight is that of the raw kernel, not of the standardised one, as in the
  released code.
  """
  for name, number in (('clipping', clipping), ('eps', eps)):
    _check_number(name, number)
  for name, function in (('exclude', exclude), ('group_fn', group_fn)):
    _check_function(name, function)
  unit_rule = _unit_rule(axes)
  is_excluded = exclude or (lambda path: False)
  group_of = group_fn or (lambda path: '')

  def init_fn(params):
    names = [path for path, _ in trees.named_leaves(params)]
    clipped = [path for path in names if not is_excluded(path)]
    groups = sorted({group_fn(path) for path in clipped}) if group_fn else []
    return AGCState(
      jnp.zeros((), jnp.int32),
      jnp.zeros((), jnp.float32),
      {name: jnp.zeros((), jnp.float32) for name in groups},
    )

  @jax.named_scope('agc')
  def update_fn(updates, state, params=None, *, sum_units=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError(
        'agc compares gradients with weights and got no params. Call '
        'update(updates, state, params).'
      )
    ratio = clipping(state.count) if callable(clipping) else clipping
    clipped_units: dict[str, jax.Array] = {}
    units: dict[str, int] = {}

    def clip(path, update, param):
      if update is None or update.size == 0 or is_excluded(path):
        return update
      shape = update.shape
      param_shape = None if param is None else jnp.shape(param)
      if param_shape != shape:
        raise ValueError(
          f"agc: the gradient of '{path}' has shape {shape}, but its parameter "
          f'has shape {param_shape}. Pass the parameters of these gradients.'
        )
      unit_axes = unit_rule(path, shape)
      try:
        clipped, is_clipped = clip_units(update, param, unit_axes, ratio, eps)
      except (TypeError, ValueError) as error:
        raise ValueError(
          f"agc: cannot clip '{path}' of shape {shape} over axes {unit_axes}: "
          f'{error}'
        ) from error
      clipped_units[path] = jnp.sum(is_clipped, dtype=jnp.float32)
      units[path] = is_clipped.size
      return clipped

    updates = trees.map_named(
      clip, updates, params, is_leaf=lambda leaf: leaf is None
    )
    if sum_units is not None:
      clipped_units, units = sum_units(clipped_units), sum_units(units)

    def fraction(paths):
      clipped = sum(clipped_units[path] for path in paths)
      total = max(sum(units[path] for path in paths), 1)
      return jnp.asarray(clipped, jnp.float32) / total

    by_group = {
      name: fraction([path for path in units if group_of(path) == name])
      for name in state.clipped_by_group
    }
    return updates, AGCState(
      optax.safe_increment(state.count), fraction(units), by_group
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def states(tree: Any) -> list[AGCState]:
  """List the `AGCState`s in a tree, such as the state of a chain."""
  is_state = lambda node: isinstance(node, AGCState)
  return [
    node for node in jax.tree.leaves(tree, is_leaf=is_state) if is_state(node)
  ]


def clip_units(
  update: jax.Array,
  param: jax.Array,
  axes: Axes,
  clipping: float | jax.Array,
  eps: float | jax.Array = 1e-3,
) -> tuple[jax.Array, jax.Array]:
  """Clip one leaf, whose units are the slices over `axes`.

  Returns:
    The clipped update, and one boolean per unit (`axes` are kept with size 1):
    whether its norm reached the bound.
  """
  max_norm = clipping * jnp.maximum(unit_norm(param, axes), eps)
  norm = unit_norm(update, axes)
  is_clipped = ~(norm < max_norm)  # So that a NaN norm counts as clipped.
  # The inner minimum only prevents 0 / 0.
  scaled = update * (max_norm / jnp.maximum(norm, 1e-6))
  # A selection, not a product with 1: XLA's products on CPU flush subnormals.
  return jnp.where(is_clipped, scaled.astype(update.dtype), update), is_clipped


def unit_norm(x: jax.Array, axes: Axes) -> jax.Array:
  """Return the float32 L2 norm over `axes`, which are kept with size 1."""
  x = jnp.abs(x) if jnp.iscomplexobj(x) else x
  squared = jnp.square(jnp.asarray(x, jnp.float32))
  return jnp.sqrt(jnp.sum(squared, axis=axes, keepdims=True))


def _check_number(name: str, value: Any) -> None:
  if isinstance(value, str):
    raise ValueError(f'agc: {name} must be a number, not {value!r}.')
  if isinstance(value, (int, float)) and not value >= 0:
    raise ValueError(f'agc: {name} must be at least 0, not {value}.')


def _check_function(name: str, value: Any) -> None:
  if value is not None and not callable(value):
    raise ValueError(
      f'agc: {name} must be a function of a path, such as lambda path: '
      f"path.startswith('head/'), not {value!r}."
    )


def _unit_rule(axes: str | UnitRule | None) -> UnitRule:
  if callable(axes):
    return axes
  if axes is None:
    return output_last_axes
  if not isinstance(axes, str) or axes not in UNIT_RULES:
    raise ValueError(
      f'agc: unknown axes {axes!r}. Use {" or ".join(UNIT_RULES)}, or a '
      'function (path, shape) -> axes.'
    )
  return UNIT_RULES[axes]
