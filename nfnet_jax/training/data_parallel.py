"""Data parallelism: the only file that knows `jax.pmap`.

`jax.pmap` is in maintenance mode. In the form used here (a split batch, results
reduced, a state that differs between devices where a trainer says so) it is
`jit(shard_map)` under another name, so leaving it touches this file alone.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from nfnet_jax.models import batch_norm

AXIS = batch_norm.REPLICA_AXIS
# Batch entries that hold one value a step, not one an example.
_SCALARS = ('step',)


class DataParallel:
  """Runs a step on every device with a split batch and the trainer's state.

  Example:
    >>> parallel = DataParallel(jax.local_devices()[:1])
    >>> batch = parallel.split({'label': np.arange(32)})
    >>> batch['label'].shape
    (1, 32)
  """

  def __init__(self, devices: Sequence[jax.Device] | None = None):
    self.devices = list(devices or jax.local_devices())
    mesh = Mesh(np.asarray(self.devices), (AXIS,))
    self._replicated = NamedSharding(mesh, PartitionSpec())
    self._split = NamedSharding(mesh, PartitionSpec(AXIS))

  @property
  def num_local(self) -> int:
    return len(self.devices)

  def count(self) -> int:
    """Counts the devices of all processes by asking each of them."""
    count = self._pmap(lambda one, reduce: reduce(one), in_axes=0)
    return int(count(np.ones(self.num_local, np.int32)))

  def replicate(self, tree):
    """Places a tree on every device.

    The result owns its buffers, so that a step may take them over.
    """
    # On CPU `may_alias=False` still shares the memory of NumPy arrays, and a
    # step that takes that over crashes.
    own = lambda leaf: jnp.array(leaf) if isinstance(leaf, np.ndarray) else leaf
    return jax.device_put(
      jax.tree.map(own, tree), self._replicated, may_alias=False
    )

  def split(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Places `[n, ...]` arrays as `[devices, n / devices, ...]`."""

    def place(name: str, value: np.ndarray) -> jax.Array:
      shape = self._split_shape(name, value.shape)
      if name in _SCALARS:
        value = np.broadcast_to(value, shape)
      return jax.device_put(value.reshape(shape), self._split)

    return {name: place(name, value) for name, value in batch.items()}

  def lower(
    self, trainer: Any, state, batch: Mapping[str, jax.ShapeDtypeStruct]
  ) -> jax.stages.Lowered:
    """Lowers a training step for its devices, which need not be there.

    Args:
      trainer: what `train_step` takes.
      state: shapes of the state, not yet distributed.
      batch: shapes of what `split` takes, of all devices together.
    """
    split = {
      name: jax.ShapeDtypeStruct(
        self._split_shape(name, value.shape), value.dtype
      )
      for name, value in batch.items()
    }
    state = jax.eval_shape(self._distributor(trainer), state)
    return self.train_step(trainer).lower(state, split)

  def _split_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if name in _SCALARS:
      return (self.num_local,)
    return (self.num_local, shape[0] // self.num_local, *shape[1:])

  def distribute(self, trainer: Any, state):
    """Places a state as a trainer keeps it, which is `trainer.axes`.

    The result owns its buffers, so that a step may take them over.
    """
    return self._distributor(trainer)(self.replicate(state))

  def _distributor(self, trainer: Any) -> Callable:
    if trainer.axes is None:
      return lambda state: state
    distribute = self._pmap(
      # A map needs something to map over.
      lambda state, device, reduce: trainer.split(state),
      in_axes=(None, 0),
      out_axes=trainer.axes,
    )
    return lambda state: distribute(state, np.arange(self.num_local))

  def collector(self, trainer: Any) -> Callable:
    """Makes what turns a trainer's state to the plain one, on every device."""
    if trainer.axes is None:
      return lambda state: state
    return self._pmap(
      lambda state, reduce: trainer.join(state), in_axes=(trainer.axes,)
    )

  def train_step(self, trainer: Any) -> Callable:
    """Makes `(state, batch) -> (state, metrics)` of a trainer's step.

    The state's buffers are donated: keep no other reference to them.

    Args:
      trainer: has `train_step(state, batch, reduce)`, and `axes`: where in its
        state the devices differ, as for `jax.pmap`; None for nowhere.
    """
    return self._pmap(
      trainer.train_step,
      in_axes=(trainer.axes, 0),
      out_axes=(trainer.axes, None),
      donate_argnums=(0,),
    )

  def eval_step(self, step: Callable) -> Callable:
    """Wraps `(params, model_state, batch, reduce) -> sums`."""
    return self._pmap(step, in_axes=(None, None, 0))

  def _pmap(
    self, step: Callable, out_axes: Any = None, **options: Any
  ) -> Callable:
    @functools.wraps(step)
    def reduced(*args):
      return step(*args, reduce=lambda tree: lax.psum(tree, AXIS))

    # Where out_axes is None, whatever leaves must have been reduced, or it
    # would silently differ between devices.
    devices = self.devices if jax.process_count() == 1 else None
    return jax.pmap(
      reduced, axis_name=AXIS, out_axes=out_axes, devices=devices, **options
    )
