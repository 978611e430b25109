"""The update sharded over the devices: each updates its units of the kernels.

Every device would otherwise keep, decay, clip and average all parameters, and
standardise all kernels, as all others do. Here each keeps whole units of every
large kernel, standardises them in float32, and gives them to all in the dtype
of the computation; gradients are summed where the units are. What a step
computes is what `step.Trainer` computes, which it is tested against.

After Xu et al., "Automatic Cross-Replica Sharding of Weight Update in
Data-Parallel Training" (arXiv 2004.13336).
"""

import collections
from collections.abc import Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

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
  """A `TrainState` in two parts, each that of some of the parameters.

  Attributes:
    kernels: this device's units of the kernels that are split, laid out
      `[H, W, O, I]` or `[O, I]`, so that a unit's weights lie together.
    rest: all other parameters, the same on every device.
  """

  kernels: state_lib.TrainState
  rest: state_lib.TrainState


@dataclasses.dataclass(frozen=True)
class ShardedTrainer:
  """A `Trainer` whose update is sharded; runs on `devices` devices only.

  Its optimiser must treat each unit of a kernel by itself, as that of the paper
  does. Without sharpness-aware minimisation.

  Attributes:
    trainer: what a step does.
    like: shapes of the plain state.
    devices: how many share the update.
    least: elements of the smallest kernel that is split.
  """

  trainer: step_lib.Trainer
  like: state_lib.TrainState
  devices: int
  least: int = 2**13

  # Where the devices' states differ; see `data_parallel.DataParallel.train_step`.
  axes = ShardedState(kernels=0, rest=None)

  @functools.cached_property
  def split_paths(self) -> frozenset[str]:
    """Paths of the kernels that are split: large ones, of whole shares."""
    return frozenset(
      path
      for path, leaf in trees.named_leaves(self.like.params)
      if path.endswith('/w')
      and len(leaf.shape) in (2, 4)
      and leaf.size >= self.least
      and leaf.shape[-1] % self.devices == 0
    )

  @functools.cached_property
  def standardized(self) -> frozenset[str]:
    """Modules whose kernels are standardised, of those that are split."""
    return frozenset(
      module
      for module, leaves in self.like.params.items()
      if f'{module}/w' in self.split_paths and 'gain' in leaves
    )

  def split(self, state: state_lib.TrainState) -> ShardedState:
    """Takes this device's part of a state, on each device."""
    index = lax.axis_index(data_parallel.AXIS)

    def own(leaf: jax.Array) -> jax.Array:
      leaf = _swap(leaf)
      if leaf.ndim < 2:
        return leaf
      units = leaf.shape[-2] // self.devices
      return lax.dynamic_slice_in_dim(leaf, index * units, units, axis=-2)

    parts = self._part(state, True), self._part(state, False)
    return ShardedState(jax.tree.map(own, parts[0]), parts[1])

  def join(self, state: ShardedState) -> state_lib.TrainState:
    """Puts the state together from all devices' parts, on each device."""
    kernels = jax.tree.map(lambda x: _swap(_gather(x)), state.kernels)
    leaves = dict(trees.named_leaves(kernels))
    leaves |= dict(trees.named_leaves(state.rest))
    return trees.map_named(lambda path, _: leaves[path], self.like)

  def _part(
    self, state: state_lib.TrainState, of_kernels: bool
  ) -> state_lib.TrainState:
    """Returns the state of a part of the parameters, in the same layout."""
    leaves = dict(trees.named_leaves(state))
    select = functools.partial(self._select, of_kernels=of_kernels)
    params = select(self.like.params)
    structure = state_lib.TrainState(
      step=self.like.step,
      params=params,
      model_state={} if of_kernels else self.like.model_state,
      opt_state=jax.eval_shape(self.trainer.optimizer.init, params),
      ema_params=params,
      ema_model_state={} if of_kernels else self.like.ema_model_state,
    )
    return trees.map_named(lambda path, _: leaves[path], structure)

  def _select(self, params: Tree, of_kernels: bool) -> Tree:
    chosen = {}
    for module, leaves in params.items():
      for name, leaf in leaves.items():
        if (f'{module}/{name}' in self.split_paths) == of_kernels:
          chosen.setdefault(module, {})[name] = leaf
    return chosen

  def train_step(
    self, state: ShardedState, batch: step_lib.Batch, reduce: step_lib.Reduce
  ) -> tuple[ShardedState, dict[str, jax.Array]]:
    """Makes one update; see `step.Trainer.train_step`."""
    kernels = jax.tree.map(_swap, state.kernels)
    prepared, pull_back = self._prepare(kernels.params, state.rest.params)
    (loss, (top1, model_state)), grads = self.trainer.gradients(
      state.rest._replace(params=prepared), batch, self._apply
    )
    batch_mismatch = self.trainer.batch_mismatch(state.rest, batch)
    loss, top1, batch_mismatch = reduce((loss, top1, batch_mismatch))
    model_state = self.trainer.mean(model_state, reduce)
    grads = pull_back(grads, reduce)
    with jax.named_scope('update'):
      squares = [optax.tree.norm(part, squared=True) for part in grads]
      grad_norm = jnp.sqrt(reduce(squares[0]) + squares[1])
    applied = self.trainer.is_applicable(
      state.rest.step, batch_mismatch, loss, grad_norm
    )

    old = ShardedState(kernels, state.rest)
    new, clipped = self._share_clipped(
      ShardedState(
        self.trainer.update(kernels, grads[0], {}),
        self.trainer.update(state.rest, grads[1], model_state),
      ),
      reduce,
    )
    new = step_lib.select_tree(applied, old, new)
    return new._replace(kernels=jax.tree.map(_swap, new.kernels)), {
      **self.trainer.metrics(state.rest, loss, top1, grad_norm, applied),
      **clipped,
    }

  def _prepare(self, kernels: Tree, rest: Tree):
    """Gathers the parameters as the model takes them.

    Returns:
      The parameters, and what takes their gradients on this device to those of
      its kernels and of the rest, summed over all devices.
    """
    standardized, pull = jax.vjp(self._standardize, kernels, rest)
    cast = self.trainer.cast
    gathered = jax.tree.map(
      lambda x: _swap(_gather(_swap(x))), cast(standardized)
    )

    def pull_back(grads: Tree, reduce: step_lib.Reduce) -> tuple[Tree, Tree]:
      scattered = jax.tree.map(
        lambda x: _swap(_scatter(_swap(x))), self._select(grads, True)
      )
      of_kernels, of_gains = pull(scattered)
      others = jax.tree.map(jnp.add, of_gains, self._select(grads, False))
      return of_kernels, reduce(others)

    return merge(gathered, cast(rest)), pull_back

  def _standardize(self, kernels: Tree, rest: Tree) -> Tree:
    """Standardises this device's units."""
    index = lax.axis_index(data_parallel.AXIS)

    def prepare(module: str, w: jax.Array) -> jax.Array:
      if module not in self.standardized:
        return w
      units = w.shape[-1]
      gain = lax.dynamic_slice_in_dim(
        rest[module]['gain'], index * units, units
      )
      return blocks.standardize(w, gain)

    return {
      module: {'w': prepare(module, leaves['w'])}
      for module, leaves in kernels.items()
    }

  def _apply(self, params: Tree, *inputs, **options):
    with hk.intercept_methods(self._leave_kernels):
      return self.trainer.model.apply(params, *inputs, **options)

  def _leave_kernels(self, call, args, kwargs, context):
    """Makes modules take kernels as they are, standardised already."""
    is_made = context.method_name != '__init__'
    if is_made and context.module.module_name in self.standardized:
      context.module.standardize = lambda w, gain: w
    return call(*args, **kwargs)

  def _share_clipped(
    self, state: ShardedState, reduce: step_lib.Reduce
  ) -> tuple[ShardedState, dict[str, jax.Array]]:
    """Replaces each part's shares of clipped units by those of both."""
    clipped, units = collections.Counter(), collections.Counter()
    for part, devices in zip(state, (self.devices, 1)):
      here = clipping.count_clipped_units(part.params)
      for statistics in agc.states(part.opt_state):
        for group, share in statistics.clipped_by_group.items():
          count = jnp.round(share * here[group])
          clipped[group] += reduce(count) if devices > 1 else count
          units[group] += here[group] * devices
    if not clipped:
      return state, {}
    whole = agc.AGCState(
      agc.states(state.rest.opt_state)[0].count,
      clipped.total() / units.total(),
      {group: clipped[group] / units[group] for group in sorted(clipped)},
    )

    def restate(part: state_lib.TrainState) -> state_lib.TrainState:
      opt_state = agc.map_states(
        lambda old: whole._replace(
          clipped_by_group={
            group: whole.clipped_by_group[group]
            for group in old.clipped_by_group
          }
        ),
        part.opt_state,
      )
      return part._replace(opt_state=opt_state)

    return (
      ShardedState(*map(restate, state)),
      step_lib.clipping_metrics(whole),
    )


def merge(*trees: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
  """Puts parameters together that were told apart by module or name."""
  merged = {}
  for tree in trees:
    for module, leaves in tree.items():
      merged.setdefault(module, {}).update(leaves)
  return merged


def _swap(x: jax.Array) -> jax.Array:
  """Turns HWIO to HWOI and back; smaller than a matrix, nothing."""
  return jnp.swapaxes(x, -1, -2) if x.ndim >= 2 else x


def _gather(x: jax.Array) -> jax.Array:
  if x.ndim < 2:
    return x
  return lax.all_gather(x, data_parallel.AXIS, axis=x.ndim - 2, tiled=True)


def _scatter(x: jax.Array) -> jax.Array:
  return lax.psum_scatter(
    x, data_parallel.AXIS, scatter_dimension=x.ndim - 2, tiled=True
  )
