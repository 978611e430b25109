"""How the training state lies on devices: replicated or sharded.

If it is replicated, every device stores, standardises, clips and averages all
parameters. If it is sharded, each device does this for its own units of every
large kernel: it all-gathers the standardised kernels for the model, and
reduce-scatters their gradients. Both make the same step, as tests check.

After Xu et al., "Automatic Cross-Replica Sharding of Weight Update in
Data-Parallel Training" (arXiv 2004.13336).
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from nfnet_jax import trees
from nfnet_jax.models import batch_norm
from nfnet_jax.models.fast import blocks
from nfnet_jax.training import state as state_lib

Tree = Any
# Name of the axis of devices that a step runs on.
AXIS = batch_norm.REPLICA_AXIS


@dataclasses.dataclass(frozen=True)
class Layout:
  """Which parameters are sharded; by default none is.

  If there are sharded kernels, a state that is placed on the devices is a pair
  of dictionaries from paths to leaves: the sharded ones, and all others. The
  sharded leaves have the shape `[devices, H, W, O / devices, I]`, so that the
  weights of a unit are contiguous. A step sees `[H, W, I, O / devices]`.

  Attributes:
    axis: name of the axis of devices; None for a step on a single device.
    devices: number of devices that divide the sharded kernels.
    sharded: paths of the sharded kernels.
    standardized: modules whose kernels `gather` standardises.
    abstract_state: shapes of the whole state, if kernels are sharded.
  """

  axis: str | None = AXIS
  devices: int = 1
  sharded: frozenset[str] = frozenset()
  standardized: frozenset[str] = frozenset()
  abstract_state: Any = None

  @property
  def axes(self) -> tuple[int, None] | None:
    """Axes of a placed state along which devices differ, as for `jax.pmap`."""
    # With several processes pmap hashes them, so they are no tree of a state.
    return (0, None) if self.sharded else None

  def sum(self, tree: Tree) -> Tree:
    """Sum a tree over the devices."""
    return tree if self.axis is None else lax.psum(tree, self.axis)

  def mean(self, tree: Tree) -> Tree:
    """Average a tree over the devices; integers, which are equal, stay."""
    devices = self.sum(1)

    def divide(total: jax.Array) -> jax.Array:
      is_integer = jnp.issubdtype(total.dtype, jnp.integer)
      return total // devices if is_integer else total / devices

    return jax.tree.map(divide, self.sum(tree))

  def gather(
    self, params: Tree, dtype: jnp.dtype
  ) -> tuple[Tree, Callable[[Tree], Tree]]:
    """Return the weights that the model is applied to.

    Args:
      params: this device's parameters, float32.
      dtype: dtype of the weights.

    Returns:
      The weights; and a function from their float32 gradient on this device to
      the gradient of `params`, summed over all devices.
    """
    standardized, pull_back = jax.vjp(self._standardize, params)
    weights = self._map_sharded(self._all_gather, cast(standardized, dtype))

    # The derivative of the lines above, but sums are in float32.
    def sum_gradient(grads: Tree) -> Tree:
      (grads,) = pull_back(self._map_sharded(self._reduce_scatter, grads))
      sharded, replicated = self._split(grads)
      leaves = {**sharded, **self.sum(replicated)}
      return trees.map_named(lambda path, _: leaves[path], grads)

    return weights, sum_gradient

  @jax.named_scope('update')
  def norm(self, grads: Tree) -> jax.Array:
    """Return the norm of the whole gradient, of which `grads` is a part."""
    sharded, replicated = self._split(grads)
    if not sharded:
      return optax.tree.norm(grads)
    squared_norm = lambda leaves: optax.tree.norm(leaves, squared=True)
    return jnp.sqrt(self.sum(squared_norm(sharded)) + squared_norm(replicated))

  def sum_units(self, counts: dict[str, Any]) -> dict[str, Any]:
    """Turn counts of this device's units, by path, into those of all units."""
    sharded, replicated = self._split(counts)
    return {**self.sum(sharded), **replicated}

  def shard_shapes(self, state: Tree) -> Tree:
    """Return the shapes of one device's part of a state."""

    def divide(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
      *others, units = leaf.shape
      return leaf.update(shape=(*others, units // self.devices))

    return self._map_sharded(divide, state)

  def shard(self, state: Tree) -> Tree:
    """Return what to place on this device of a whole state."""

    def take_units(leaf: jax.Array) -> jax.Array:
      return self._take_units(leaf, leaf.shape[-1] // self.devices)

    return self.store(self._map_sharded(take_units, state))

  def unshard(self, placed: Tree) -> Tree:
    """Reverse `shard`: gather the whole state from all devices."""
    return self._map_sharded(self._all_gather, self.load(placed))

  def load(self, placed: Tree) -> Tree:
    """Return what a step sees of a placed state."""
    if not self.sharded:
      return placed
    sharded, replicated = placed
    leaves = {**jax.tree.map(_swap, sharded), **replicated}
    return trees.map_named(lambda path, _: leaves[path], self.abstract_state)

  def store(self, state: Tree) -> Tree:
    """Reverse `load`."""
    if not self.sharded:
      return state
    sharded, replicated = self._split(state)
    return jax.tree.map(_swap, sharded), replicated

  def _is_sharded(self, path: str) -> bool:
    # The paths of a kernel's average and momentum end with the kernel's.
    return f'/{path}'.endswith(tuple(f'/{kernel}' for kernel in self.sharded))

  def _map_sharded(self, function: Callable[[Any], Any], tree: Tree) -> Tree:
    """Map the sharded leaves of a state or of parameters, and no others."""
    return trees.map_named(
      lambda path, leaf: function(leaf) if self._is_sharded(path) else leaf,
      tree,
    )

  def _split(self, tree: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the sharded and the replicated leaves, by their paths."""
    sharded: dict[str, Any] = {}
    replicated: dict[str, Any] = {}
    for path, leaf in trees.named_leaves(tree):
      (sharded if self._is_sharded(path) else replicated)[path] = leaf
    return sharded, replicated

  def _standardize(self, params: Tree) -> Tree:
    """Standardise this device's units of the sharded kernels."""

    def standardize(w: jax.Array, gain: jax.Array, **bias: jax.Array) -> Tree:
      own_gain = self._take_units(gain, w.shape[-1])
      return {'w': blocks.standardize(w, own_gain), 'gain': gain, **bias}

    return {
      module: standardize(**leaves) if module in self.standardized else leaves
      for module, leaves in params.items()
    }

  def _take_units(self, leaf: jax.Array, units: int) -> jax.Array:
    """Return the values that belong to this device's units."""
    begin = lax.axis_index(self.axis) * units
    return lax.dynamic_slice_in_dim(leaf, begin, units, axis=-1)

  def _all_gather(self, kernel: jax.Array) -> jax.Array:
    """Concatenate the units of all devices."""
    stored = _swap(kernel)
    return _swap(
      lax.all_gather(stored, self.axis, axis=stored.ndim - 2, tiled=True)
    )

  def _reduce_scatter(self, grad: jax.Array) -> jax.Array:
    """Sum over the devices; return the sum for this device's units."""
    stored = _swap(grad)
    axis = stored.ndim - 2
    return _swap(
      lax.psum_scatter(stored, self.axis, scatter_dimension=axis, tiled=True)
    )


REPLICATED = Layout()


def shard_kernels(
  state: state_lib.TrainState, devices: int, min_size: int = 2**13
) -> Layout:
  """Shard the large kernels whose units divide evenly among the devices.

  The optimiser must treat each unit of a kernel independently of all others, as
  the paper's does, and SAM cannot be used; `config.fast_paths` has this rule.

  Args:
    state: shapes of the whole state.
    devices: number of devices.
    min_size: elements of the smallest kernel that is sharded.
  """
  sharded = frozenset(
    path
    for path, leaf in trees.named_leaves(state.params)
    if path.endswith('/w')
    and len(leaf.shape) in (2, 4)
    and leaf.size >= min_size
    and leaf.shape[-1] % devices == 0
  )
  standardized = frozenset(
    module
    for module, leaves in state.params.items()
    if f'{module}/w' in sharded and 'gain' in leaves
  )
  return Layout(
    devices=devices,
    sharded=sharded,
    standardized=standardized,
    abstract_state=state,
  )


@jax.named_scope('cast')
def cast(tree: Tree, dtype: jnp.dtype) -> Tree:
  """Cast the leaves of a tree."""
  return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def _swap(x: jax.Array) -> jax.Array:
  """Swap input and output channels: HWIO to HWOI, and back."""
  return jnp.swapaxes(x, -1, -2)
