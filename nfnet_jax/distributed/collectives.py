"""What several processes tell one another; all of them call, in one order.

A process alone is told what it says itself.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from nfnet_jax.distributed import processes

# Processes wait for one another as long as the watch lets them.
_FOREVER_MS = 7 * 24 * 3600 * 1000
_CHUNK = 1 << 24  # 64 MiB of uint32.


def from_primary(make: Callable[[], Any]) -> Any:
  """Returns to every process what `make` returns to process 0.

  Args:
    make: called by process 0 alone; returns what JSON can hold.

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
    process_group.client.blocking_key_value_get(key, _FOREVER_MS)
  )


def all_true(holds: bool) -> bool:
  """Returns whether something holds in every process.

  Example:
    >>> everywhere(True)
    True
  """
  if (process_group := processes.process_group()) is None:
    return holds
  key = f'nfnet_jax/votes/{next(process_group.keys)}'
  process_group.client.key_value_set(f'{key}/{process_group.index}', str(holds))
  votes = [
    process_group.client.blocking_key_value_get(f'{key}/{index}', _FOREVER_MS)
    for index in range(process_group.count)
  ]
  return all(vote == str(True) for vote in votes)


def assert_equal(facts: Mapping[str, str]) -> None:
  """Checks that all processes have the same facts as process 0.

  Those that have wait for the failure of one that has not.

  Raises:
    ValueError: naming those that differ here.
  """
  theirs = from_primary(lambda: dict(facts))
  differing = [
    f'{name} ({theirs.get(name)} there, {facts.get(name)} here)'
    for name in sorted(theirs.keys() | facts.keys())
    if theirs.get(name) != facts.get(name)
  ]
  agreed = all_true(not differing)
  if differing:
    raise ValueError(
      f'Process {processes.process_group().index} differs from process 0 in '
      f'{", ".join(differing)}. Run the same command with the same '
      'installation on every host.'
    )
  if not agreed:
    processes.await_failure()


@contextlib.contextmanager
def primary_first() -> Iterator[None]:
  """Lets the other processes in once process 0 has left.

  For what the first to come prepares for all, such as a dataset.
  """
  if not processes.is_primary():
    from_primary(lambda: None)
  yield
  if processes.is_primary():
    from_primary(lambda: None)


def broadcast(tree: Any, like: Any) -> Any:
  """Returns process 0's tree, bit for bit, to every process.

  Args:
    tree: of arrays; only process 0's counts, others may pass None.
    like: a tree of arrays or shapes of the same structure.
  """
  if not processes.are_several():
    return tree
  leaves, structure = jax.tree.flatten(like)
  if processes.is_primary():
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
  else:
    leaves = [np.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
  # As integers, in pieces of one size: exact, and compiled once.
  raw = b''.join(leaf.tobytes() for leaf in leaves)
  chunk = min(_CHUNK, -(-len(raw) // 4))
  padded = np.zeros(-(-len(raw) // (4 * chunk)) * chunk, np.uint32)
  padded.view(np.uint8)[: len(raw)] = np.frombuffer(raw, np.uint8)
  for begin in range(0, len(padded), chunk):
    piece = slice(begin, begin + chunk)
    padded[piece] = multihost_utils.broadcast_one_to_all(padded[piece])
  return jax.tree.unflatten(structure, _cut(padded.tobytes(), leaves))


def _cut(raw: bytes, leaves: list[np.ndarray]) -> Iterator[np.ndarray]:
  """Reads arrays like `leaves` off the front of their bytes."""
  offset = 0
  for leaf in leaves:
    flat = np.frombuffer(raw, leaf.dtype, leaf.size, offset)
    yield flat.reshape(leaf.shape).copy()
    offset += leaf.nbytes
