"""The update sharded over the devices: each updates its units of the kernels.

In plain data parallelism every device stores, decays, clips and averages all
parameters and standardises all kernels. Here each device does this for its own
units of every large kernel: it standardises them in float32 and all-gathers
them in the dtype of the computation, and their gradients are reduce-scattered.
A step computes the same as `step.Trainer`, as tests check.

After Xu et al., "Automatic Cross-Replica Sharding of Weight Update in
Data-Parallel Training" (arXiv 2004.13336).
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import haiku as hk
import jax
from jax import lax
import jax.numpy as jnp
import optax

from nfnet_jax import trees
from nfnet_jax.models.fast import blocks
from nfnet_jax.optim import agc, clipping
from nfnet_jax.training import data_parallel
from nfnet_jax.training import state as state_lib
from nfnet_jax.training import step as step_lib

Tree = Any


class ShardedState(NamedTuple):
  """A `TrainState` in two parts, each with some of the parameters.

  Attributes:
    sharded: this device's units of the sharded kernels, in the layout
      `[H, W, O, I]` or `[O, I]`, so that a unit's weights are contiguous.
    replicated: all other parameters, the same on every device.
  """

  sharded: state_lib.TrainState
  replicated: state_lib.TrainState


@dataclasses.dataclass(frozen=True)
class ShardedTrainer:
  """A `Trainer` with a sharded update, for a fixed number of devices.

  Its optimiser must treat each unit of a kernel independently of all others, as
  the paper's optimiser does. It does not support SAM.

  Attributes:
    trainer: the plain training step.
    abstract_state: shapes of the plain state.
    devices: number of devices that share the update.
    min_size: elements of the smallest kernel that is sharded.
  """

  trainer: step_lib.Trainer
  abstract_state: state_lib.TrainState
  devices: int
  min_size: int = 2**13

  # Of (sharded, replicated); see `data_parallel.DataParallel.train_step`.
  state_axes: ClassVar[Any] = ShardedState._make((0, None))

  @functools.cached_property
  def sharded_paths(self) -> frozenset[str]:
    """Paths of the kernels that are sharded: large ones that divide evenly."""
    return frozenset(
      path
      for path, leaf in trees.named_leaves(self.abstract_state.params)
      if path.endswith('/w')
      and len(leaf.shape) in (2, 4)
      and leaf.size >= self.min_size
      and leaf.shape[-1] % self.devices == 0
    )

  @functools.cached_property
  def standardized(self) -> frozenset[str]:
    """Modules with standardised kernels among those with sharded kernels."""
    return frozenset(
      module
      for module, leaves in self.abstract_state.params.items()
      if f'{module}/w' in self.sharded_paths and 'gain' in leaves
    )

  def shard(self, state: state_lib.TrainState) -> ShardedState:
    """Return this device's part of a plain state; called on each device."""
    index = lax.axis_index(data_parallel.AXIS)

    def take_units(leaf: jax.Array) -> jax.Array:
      leaf = _swap(leaf)
      if leaf.ndim < 2:
        return leaf
      units = leaf.shape[-2] // self.devices
      return lax.dynamic_slice_in_dim(leaf, index * units, units, axis=-2)

    return ShardedState(
      jax.tree.map(take_units, self._select_state(state, sharded=True)),
      self._select_state(state, sharded=False),
    )

  def unshard(self, state: ShardedState) -> state_lib.TrainState:
    """Gather the plain state from all devices; called on each device."""
    whole = jax.tree.map(lambda x: _swap(_gather(x)), state.sharded)
    leaves = dict(trees.named_leaves(whole))
    leaves |= dict(trees.named_leaves(state.replicated))
    return trees.map_named(lambda path, _: leaves[path], self.abstract_state)

  def _select_state(
    self, state: state_lib.TrainState, *, sharded: bool
  ) -> state_lib.TrainState:
    """Return the state of the sharded or of all other parameters."""
    leaves = dict(trees.named_leaves(state))
    whole = self.abstract_state
    params = self._select_params(whole.params, sharded=sharded)
    structure = state_lib.TrainState(
      step=whole.step,
      params=params,
      model_state={} if sharded else whole.model_state,
      opt_state=jax.eval_shape(self.trainer.optimizer.init, params),
      ema_params=params,
      ema_model_state={} if sharded else whole.ema_model_state,
    )
    return trees.map_named(lambda path, _: leaves[path], structure)

  def _select_params(self, params: Tree, *, sharded: bool) -> Tree:
    """Return the sharded or all other parameters."""
    selected: dict[str, dict[str, Any]] = {}
    for module, leaves in params.items():
      for name, leaf in leaves.items():
        if (f'{module}/{name}' in self.sharded_paths) == sharded:
          selected.setdefault(module, {})[name] = leaf
    return selected

  def train_step(
    self, state: ShardedState, batch: step_lib.Batch, reduce: step_lib.Reduce
  ) -> tuple[ShardedState, dict[str, jax.Array]]:
    """Return the state after one update; see `step.Trainer.train_step`."""
    sharded = jax.tree.map(_swap, state.sharded)
    replicated = state.replicated
    prepared, reduce_grads = self._prepare(sharded.params, replicated.params)
    (loss, (top1, model_state)), grads = self.trainer.gradients(
      replicated._replace(params=prepared), batch, self._apply
    )
    batch_mismatch = self.trainer.batch_mismatch(replicated, batch)
    loss, top1, batch_mismatch = reduce((loss, top1, batch_mismatch))
    model_state = self.trainer.average_statistics(model_state, reduce)
    grads = reduce_grads(grads, reduce)
    with jax.named_scope('update'):
      squares = [optax.tree.norm(part, squared=True) for part in grads]
      grad_norm = jnp.sqrt(reduce(squares[0]) + squares[1])
    applied = self.trainer.is_applicable(
      replicated.step, batch_mismatch, loss, grad_norm
    )

    new, clipped = self._combine_clipping(
      ShardedState(
        self.trainer.update(sharded, grads[0], {}),
        self.trainer.update(replicated, grads[1], model_state),
      ),
      reduce,
    )
    old = ShardedState(sharded, replicated)
    new = step_lib.select_tree(applied, old, new)
    return new._replace(sharded=jax.tree.map(_swap, new.sharded)), {
      **self.trainer.metrics(replicated, loss, top1, grad_norm, applied),
      **clipped,
    }

  def _prepare(
    self, sharded: Tree, replicated: Tree
  ) -> tuple[Tree, Callable[[Tree, step_lib.Reduce], tuple[Tree, Tree]]]:
    """Gather the parameters that the model is applied to.

    Returns:
      The parameters in the dtype of the computation, and a function from this
      device's gradients of them to the gradients of its sharded and of the
      replicated parameters, summed over all devices.
    """
    standardized, pull_back = jax.vjp(self._standardize, sharded, replicated)
    cast = self.trainer.cast
    gathered = jax.tree.map(
      lambda x: _swap(_gather(_swap(x))), cast(standardized)
    )

    def reduce_grads(grads: Tree, reduce: step_lib.Reduce) -> tuple[Tree, Tree]:
      scattered = jax.tree.map(
        lambda x: _swap(_scatter(_swap(x))),
        self._select_params(grads, sharded=True),
      )
      of_sharded, of_gains = pull_back(scattered)
      of_others = self._select_params(grads, sharded=False)
      return of_sharded, reduce(jax.tree.map(jnp.add, of_gains, of_others))

    return _merge(gathered, cast(replicated)), reduce_grads

  def _standardize(self, sharded: Tree, replicated: Tree) -> Tree:
    """Standardise this device's units."""
    index = lax.axis_index(data_parallel.AXIS)

    def prepare(module: str, w: jax.Array) -> jax.Array:
      if module not in self.standardized:
        return w
      units = w.shape[-1]
      gain = lax.dynamic_slice_in_dim(
        replicated[module]['gain'], index * units, units
      )
      return blocks.standardize(w, gain)

    return {
      module: {'w': prepare(module, leaves['w'])}
      for module, leaves in sharded.items()
    }

  def _apply(
    self, params: Tree, *inputs: Any, **options: Any
  ) -> tuple[jax.Array, Tree]:
    with hk.intercept_methods(self._skip_standardization):
      return self.trainer.model.apply(params, *inputs, **options)

  def _skip_standardization(
    self,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: hk.MethodContext,
  ) -> Any:
    """Make modules use their kernels unchanged, as these are standardised."""
    module: Any = context.module
    is_made = context.method_name != '__init__'
    if is_made and module.module_name in self.standardized:
      module.standardize = lambda w, gain: w
    return call(*args, **kwargs)

  def _combine_clipping(
    self, state: ShardedState, reduce: step_lib.Reduce
  ) -> tuple[ShardedState, dict[str, jax.Array]]:
    """Replace each part's clipped fractions by those of all units.

    Returns:
      The state with them, and their metrics.
    """
    # Group -> number of units: float32 arrays, and integers.
    clipped: collections.Counter[str] = collections.Counter()
    units: collections.Counter[str] = collections.Counter()
    for part, devices in zip(state, (self.devices, 1)):
      local_units = clipping.count_clipped_units(part.params)
      for statistics in agc.states(part.opt_state):
        for group, fraction in statistics.clipped_by_group.items():
          count: Any = jnp.round(fraction * local_units[group])
          clipped[group] += reduce(count) if devices > 1 else count
          units[group] += local_units[group] * devices
    if not clipped:
      return state, {}
    total: Any = clipped.total() / units.total()
    fractions: Any = {
      group: clipped[group] / units[group] for group in sorted(clipped)
    }
    combined = agc.AGCState(
      agc.states(state.replicated.opt_state)[0].count, total, fractions
    )

    def replace(part: state_lib.TrainState) -> state_lib.TrainState:
      opt_state = agc.map_states(
        lambda old: combined._replace(
          clipped_by_group={
            group: fractions[group] for group in old.clipped_by_group
          }
        ),
        part.opt_state,
      )
      return part._replace(opt_state=opt_state)

    return (
      ShardedState(*map(replace, state)),
      step_lib.clipping_metrics(combined),
    )


def _merge(
  *parts: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
  """Merge parameter trees that share no parameter."""
  merged: dict[str, dict[str, Any]] = {}
  for part in parts:
    for module, leaves in part.items():
      merged.setdefault(module, {}).update(leaves)
  return merged


def _swap(x: jax.Array) -> jax.Array:
  """Swap input and output channels (HWIO, HWOI); return vectors unchanged."""
  return jnp.swapaxes(x, -1, -2) if x.ndim >= 2 else x


def _gather(x: jax.Array) -> jax.Array:
  if x.ndim < 2:
    return x
  return lax.all_gather(x, data_parallel.AXIS, axis=x.ndim - 2, tiled=True)


def _scatter(x: jax.Array) -> jax.Array:
  return lax.psum_scatter(
    x, data_parallel.AXIS, scatter_dimension=x.ndim - 2, tiled=True
  )
