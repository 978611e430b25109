"""Data parallelism: the only file that uses `jax.pmap`.

`jax.pmap` is in maintenance mode. As used here (a sharded batch, reduced
results, a state that differs between devices only where the trainer declares
it) it is `jit(shard_map)` under another name, so only this file has to change
when it is replaced.
"""

from __future__ import annotations

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
# Batch entries with one value per step, not per example.
_SCALARS = ('step',)


class DataParallel:
  """Runs a step on every device with a sharded batch and the trainer's state.

  Example:
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
    mesh = Mesh(np.asarray(self.devices), (AXIS,))
    self._replicated = NamedSharding(mesh, PartitionSpec())
    self._sharded = NamedSharding(mesh, PartitionSpec(AXIS))

  @property
  def num_local(self) -> int:
    """Number of devices of this process."""
    return len(self.devices)

  def count(self) -> int:
    """Count the devices of all processes by a sum over them."""
    count = self._pmap(lambda one, reduce: reduce(one), in_axes=0)
    return int(count(np.ones(self.num_local, np.int32)))

  def replicate(self, tree: Any) -> Any:
    """Place a tree on every device.

    The result owns its buffers, so that they can be donated to a step.
    """
    # On CPU `may_alias=False` still shares the memory of NumPy arrays, and a
    # step that such memory is donated to crashes.
    own = lambda leaf: jnp.array(leaf) if isinstance(leaf, np.ndarray) else leaf
    return jax.device_put(
      jax.tree.map(own, tree), self._replicated, may_alias=False
    )

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
    trainer: Any,
    state: Any,
    batch: Mapping[str, jax.ShapeDtypeStruct],
  ) -> jax.stages.Lowered:
    """Lower a training step for its devices, which need not exist.

    Args:
      trainer: see `train_step`.
      state: shapes of the plain state.
      batch: shapes of the batch of all devices, as for `shard_batch`.
    """
    sharded = {
      name: jax.ShapeDtypeStruct(
        self._sharded_shape(name, value.shape), value.dtype
      )
      for name, value in batch.items()
    }
    state = jax.eval_shape(self._shard_fn(trainer), state)
    return self.train_step(trainer).lower(state, sharded)

  def _sharded_shape(
    self, name: str, shape: tuple[int, ...]
  ) -> tuple[int, ...]:
    if name in _SCALARS:
      return (self.num_local,)
    return (self.num_local, shape[0] // self.num_local, *shape[1:])

  def shard_state(self, trainer: Any, state: Any) -> Any:
    """Place a plain state on the devices in the trainer's arrangement.

    The result owns its buffers, so that they can be donated to a step.

    Args:
      trainer: see `train_step`.
      state: tree of host or device arrays.
    """
    return self._shard_fn(trainer)(self.replicate(state))

  def _shard_fn(self, trainer: Any) -> Callable[[Any], Any]:
    if trainer.state_axes is None:
      return lambda state: state
    shard = self._pmap(
      # pmap needs at least one mapped argument.
      lambda state, device, reduce: trainer.shard(state),
      in_axes=(None, 0),
      out_axes=trainer.state_axes,
    )
    return lambda state: shard(state, np.arange(self.num_local))

  def gather_state(self, trainer: Any) -> Callable[[Any], Any]:
    """Return a function from the trainer's arrangement to the plain state.

    It reverses `shard_state` and leaves the whole state on every device.
    """
    if trainer.state_axes is None:
      return lambda state: state
    return self._pmap(
      lambda state, reduce: trainer.unshard(state),
      in_axes=(trainer.state_axes,),
    )

  def train_step(self, trainer: Any) -> jax.stages.Wrapped:
    """Return the compiled `(state, batch) -> (state, metrics)` of a trainer.

    The state's buffers are donated: keep no other reference to them.

    Args:
      trainer: has `train_step(state, batch, reduce)` and `state_axes`, the axes
        of its state along which devices differ, as for `jax.pmap`; None if all
        devices hold the same. If devices differ, it also has `shard(state)` and
        `unshard(state)`.
    """
    return self._pmap(
      trainer.train_step,
      in_axes=(trainer.state_axes, 0),
      out_axes=(trainer.state_axes, None),
      donate_argnums=(0,),
    )

  def eval_step(self, step: Callable[..., Any]) -> jax.stages.Wrapped:
    """Compile `(params, model_state, batch, reduce) -> sums`."""
    return self._pmap(step, in_axes=(None, None, 0))

  def _pmap(
    self, step: Callable[..., Any], out_axes: Any = None, **options: Any
  ) -> jax.stages.Wrapped:
    @functools.wraps(step)
    def reduced(*args):
      return step(*args, reduce=lambda tree: lax.psum(tree, AXIS))

    # Outputs whose out_axes is None must have been reduced, or they would
    # differ between devices without an error.
    devices = self.devices if jax.process_count() == 1 else None
    return jax.pmap(
      reduced, axis_name=AXIS, out_axes=out_axes, devices=devices, **options
    )
