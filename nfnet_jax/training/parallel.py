"""Data parallelism: the only file that knows `jax.pmap`.

`jax.pmap` is in maintenance mode. In the form used here (replicated state in,
reduced state out) it is `jit(shard_map)` under another name, so leaving it
touches this file alone.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

AXIS = 'batch'
# Batch entries that hold one value a step, not one an example.
_SCALARS = ('step',)


class DataParallel:
  """Runs a step on every device with a replicated state and a split batch.

  Example:
    >>> parallel = DataParallel(jax.local_devices())
    >>> step = parallel.train_step(lambda state, batch, reduce: (state, {}))
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
    return jax.device_put(tree, self._replicated, may_alias=False)

  def split(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Places `[n, ...]` arrays as `[devices, n / devices, ...]`."""

    def place(name: str, value: np.ndarray) -> jax.Array:
      if name in _SCALARS:
        value = np.broadcast_to(value, (self.num_local,))
      else:
        value = value.reshape(self.num_local, -1, *value.shape[1:])
      return jax.device_put(value, self._split)

    return {name: place(name, value) for name, value in batch.items()}

  def train_step(self, step: Callable) -> Callable:
    """Wraps `(state, batch, reduce) -> (state, metrics)`; takes over `state`.

    The state's buffers are donated: keep no other reference to them.
    """
    return self._pmap(step, in_axes=(None, 0), donate_argnums=(0,))

  def eval_step(self, step: Callable) -> Callable:
    """Wraps `(params, model_state, batch, reduce) -> sums`."""
    return self._pmap(step, in_axes=(None, None, 0))

  def _pmap(self, step: Callable, **options: Any) -> Callable:
    @functools.wraps(step)
    def reduced(*args):
      return step(*args, reduce=lambda tree: lax.psum(tree, AXIS))

    # out_axes=None: whatever leaves must have been reduced, or it would
    # silently differ between devices.
    devices = self.devices if jax.process_count() == 1 else None
    return jax.pmap(
      reduced, axis_name=AXIS, out_axes=None, devices=devices, **options
    )
