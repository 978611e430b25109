"""Exchange of values between processes.

All processes must make the same calls in the same order. With a single process
every function returns its own argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from nfnet_jax.distributed import processes

_CHUNK = 1 << 24  # 64 MiB of uint32.


def from_primary(make: Callable[[], Any]) -> Any:
  """Return to every process what `make` returns in process 0.

  Args:
    make: called only in process 0; its result must be serializable as JSON.

  Example:
    >>> from_primary(lambda: [1, 2])
    [1, 2]
  """
  if (process_group := processes.process_group()) is None:
    return make()
  key = f'nfnet_jax/shared/{next(process_group.keys)}'
  if processes.is_primary():
    process_group.client.key_value_set(key, json.dumps(make()))
  return json.loads(
    process_group.client.blocking_key_value_get(key, processes.NO_TIMEOUT_MS)
  )


def all_true(value: bool) -> bool:
  """Return whether `value` is true in every process.

  Example:
    >>> all_true(True)
    True
  """
  if (process_group := processes.process_group()) is None:
    return value
  key = f'nfnet_jax/votes/{next(process_group.keys)}'
  process_group.client.key_value_set(f'{key}/{process_group.index}', str(value))
  votes = [
    process_group.client.blocking_key_value_get(
      f'{key}/{index}', processes.NO_TIMEOUT_MS
    )
    for index in range(process_group.count)
  ]
  return all(vote == str(True) for vote in votes)


def assert_equal(facts: Mapping[str, str]) -> None:
  """Check that all processes have the same facts as process 0.

  A process that agrees with process 0 waits for one that differs to fail.

  Raises:
    ValueError: if this process differs; names the facts that do.
  """
  theirs = from_primary(lambda: dict(facts))
  differing = [
    f'{name} ({theirs.get(name)} there, {facts.get(name)} here)'
    for name in sorted(theirs.keys() | facts.keys())
    if theirs.get(name) != facts.get(name)
  ]
  all_agree = all_true(not differing)
  if differing:
    process_group = processes.process_group()
    assert process_group is not None  # A single process equals itself.
    raise ValueError(
      f'Process {process_group.index} differs from process 0 in '
      f'{", ".join(differing)}. Run the same command with the same '
      'installation on every host.'
    )
  if not all_agree:
    processes.await_failure()


@contextlib.contextmanager
def primary_first() -> Iterator[None]:
  """Run the body in process 0, then in the other processes.

  For work that the first process does for all, such as preparing a dataset.
  """
  if not processes.is_primary():
    from_primary(lambda: None)
  yield
  if processes.is_primary():
    from_primary(lambda: None)


def broadcast(tree: Any, template: Any) -> Any:
  """Return process 0's tree, bit for bit, to every process.

  Args:
    tree: a pytree of arrays; ignored in processes other than 0, which may pass
      None.
    template: a pytree of arrays or of `jax.ShapeDtypeStruct`, with the same
      structure, shapes and dtypes.
  """
  if not processes.are_several():
    return tree
  leaves, structure = jax.tree.flatten(template)
  if processes.is_primary():
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
  else:
    leaves = [np.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
  # As integers, which are exact, in chunks of one size, which compile once.
  raw = b''.join(leaf.tobytes() for leaf in leaves)
  chunk = min(_CHUNK, -(-len(raw) // 4))
  padded = np.zeros(-(-len(raw) // (4 * chunk)) * chunk, np.uint32)
  padded.view(np.uint8)[: len(raw)] = np.frombuffer(raw, np.uint8)
  for begin in range(0, len(padded), chunk):
    piece = slice(begin, begin + chunk)
    padded[piece] = multihost_utils.broadcast_one_to_all(padded[piece])
  return jax.tree.unflatten(structure, _unpack(padded.tobytes(), leaves))


def _unpack(raw: bytes, leaves: list[np.ndarray]) -> Iterator[np.ndarray]:
  """Yield arrays of the shapes and dtypes of `leaves` from their bytes."""
  offset = 0
  for leaf in leaves:
    flat = np.frombuffer(raw, leaf.dtype, leaf.size, offset)
    yield flat.reshape(leaf.shape).copy()
    offset += leaf.nbytes
