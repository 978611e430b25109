"""Data parallelism: the only file that uses `jax.pmap`.

`jax.pmap` is in maintenance mode. As used here (a sharded batch, reduced
results, a state that differs between devices only where the layout declares
it) it is `jit(shard_map)` under another name, so only this file has to change
when it is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from nfnet_jax.training import layouts
from nfnet_jax.training import state as state_lib
from nfnet_jax.training import step as step_lib

# Batch entries with one value per step, not per example.
_SCALARS = ('step',)


class DataParallel:
  """Runs a step on every device with a sharded batch and the trainer's state.

  Examples:
    >>> parallel = DataParallel(jax.local_devices()[:1])
    >>> batch = parallel.shard_batch({'label': np.arange(32)})
    >>> batch['label'].shape
    (1, 32)
  """

  def __init__(self, devices: Sequence[jax.Device] | None = None):
    """Use some devices of this process.

    Args:
      devices: the devices; all local ones by default.
    """
    self.devices = list(devices or jax.local_devices())
    mesh = Mesh(np.asarray(self.devices), (layouts.AXIS,))
    self._replicated = NamedSharding(mesh, PartitionSpec())
    self._sharded = NamedSharding(mesh, PartitionSpec(layouts.AXIS))

  @property
  def num_local(self) -> int:
    """Number of devices of this process."""
    return len(self.devices)

  def count(self) -> int:
    """Count the devices of all processes by a sum over them."""
    count = self._pmap(layouts.REPLICATED.sum, in_axes=(0,), out_axes=None)
    return int(count(np.ones(self.num_local, np.int32)))

  def replicate(self, tree: Any) -> Any:
    """Place a tree on every device.

    The result owns its buffers, so that they can be donated to a step.
    """

    # On CPU `may_alias=False` still shares the memory of NumPy arrays, and a
    # step that such memory is donated to crashes.
    def place(leaf: np.ndarray | jax.Array) -> jax.Array:
      owned = jnp.array(leaf) if isinstance(leaf, np.ndarray) else leaf
      return jax.device_put(owned, self._replicated, may_alias=False)

    return jax.tree.map(place, tree)

  def shard_batch(
    self, batch: Mapping[str, np.ndarray]
  ) -> dict[str, jax.Array]:
    """Place `[n, ...]` arrays as `[devices, n / devices, ...]`."""

    def place(name: str, value: np.ndarray) -> jax.Array:
      shape = self._sharded_shape(name, value.shape)
      if name in _SCALARS:
        value = np.broadcast_to(value, shape)
      return jax.device_put(value.reshape(shape), self._sharded)

    return {name: place(name, value) for name, value in batch.items()}

  def lower(
    self,
    trainer: step_lib.Trainer,
    state: state_lib.TrainState,
    batch: Mapping[str, jax.ShapeDtypeStruct],
  ) -> jax.stages.Lowered:
    """Lower a training step for its devices, which need not exist.

    Args:
      trainer: the training step.
      state: shapes of the whole state.
      batch: shapes of the batch of all devices, as for `shard_batch`.
    """
    sharded = {
      name: jax.ShapeDtypeStruct(
        self._sharded_shape(name, value.shape), value.dtype
      )
      for name, value in batch.items()
    }
    state = jax.eval_shape(self._shard_fn(trainer.layout), state)
    return self.train_step(trainer).lower(state, sharded)

  def _sharded_shape(
    self, name: str, shape: tuple[int, ...]
  ) -> tuple[int, ...]:
    if name in _SCALARS:
      return (self.num_local,)
    return (self.num_local, shape[0] // self.num_local, *shape[1:])

  def shard_state(
    self, layout: layouts.Layout, state: state_lib.TrainState
  ) -> state_lib.TrainState:
    """Place a whole state on the devices.

    The result owns its buffers, so that they can be donated to a step.

    Args:
      layout: how the state lies on the devices.
      state: tree of host or device arrays.
    """
    return self._shard_fn(layout)(self.replicate(state))

  def _shard_fn(
    self, layout: layouts.Layout
  ) -> Callable[[state_lib.TrainState], state_lib.TrainState]:
    if not layout.sharded:
      return lambda state: state
    shard = self._pmap(
      # pmap needs at least one mapped argument.
      lambda state, device: layout.shard(state),
      in_axes=(None, 0),
      out_axes=layout.axes,
    )
    return lambda state: shard(state, np.arange(self.num_local))

  def gather_state(
    self, layout: layouts.Layout
  ) -> Callable[[state_lib.TrainState], state_lib.TrainState]:
    """Return a function from a placed state to the whole state on each device.

    It reverses `shard_state`.
    """
    if not layout.sharded:
      return lambda state: state
    return self._pmap(layout.unshard, in_axes=(layout.axes,), out_axes=None)

  def train_step(self, trainer: step_lib.Trainer) -> jax.stages.Wrapped:
    """Compile `(state, batch) -> (state, metrics)` of a trainer.

    The state is one that `shard_state` placed. Its buffers are donated: keep no
    other reference to them.
    """
    layout = trainer.layout

    def step(
      placed: state_lib.TrainState, batch: step_lib.Batch
    ) -> tuple[state_lib.TrainState, dict[str, jax.Array]]:
      state, metrics = trainer.train_step(layout.load(placed), batch)
      return layout.store(state), metrics

    return self._pmap(
      step,
      in_axes=(layout.axes, 0),
      out_axes=(layout.axes, None),
      donate_argnums=(0,),
    )

  def eval_step(self, step: Callable[..., Any]) -> jax.stages.Wrapped:
    """Compile `(params, model_state, batch) -> sums` over all devices."""
    return self._pmap(step, in_axes=(None, None, 0), out_axes=None)

  def _pmap(self, function: Callable[..., Any], **options: Any) -> Any:
    # Outputs whose out_axes is None must have been reduced, or they would
    # differ between devices without an error.
    devices = self.devices if jax.process_count() == 1 else None
    return jax.pmap(
      function, axis_name=layouts.AXIS, devices=devices, **options
    )
