"""Exchange of values between processes.

All processes must make the same calls in the same order, once their devices
are known to be there. With a single process every function returns its own
argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from nfnet_jax import errors
from nfnet_jax.distributed import processes

_CHUNK = 1 << 24  # 64 MiB of uint32.


def all_gather(value: Any) -> list[Any]:
  """Return the values of all processes, in the order of their numbers.

  Args:
    value: must be serializable as JSON; of any size.

  Examples:
    >>> all_gather({'seed': 0})
    [{'seed': 0}]
  """
  if not processes.are_several():
    return [value]
  raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(raw)))
  # Powers of two, so that few sizes are compiled.
  padded = np.zeros(1 << int(max(sizes)).bit_length(), np.uint8)
  padded[: len(raw)] = raw
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(row[:n].tobytes()) for row, n in zip(rows, sizes)]


def raise_together(error: Exception | None) -> None:
  """Raise the first error that a process has, in every process.

  The processes part before it is raised, so that each can exit normally.

  Args:
    error: the error of this process, if it has one.

  Raises:
    Exception: `error` itself in the process that has it; in the others an
      `InputError` or a `RunError` with the same message.
  """
  is_input = isinstance(error, errors.InputError)
  described = error and [is_input, _describe(error)]
  for index, other in enumerate(all_gather(described)):
    if other:
      processes.finish()
      if index == jax.process_index() and error:
        raise error
      is_input, text = other
      raise (errors.InputError if is_input else errors.RunError)(text)


def _describe(error: Exception) -> str:
  text = errors.one_line(error)
  is_known = isinstance(error, (errors.InputError, errors.RunError))
  return text if is_known else f'{type(error).__name__}: {text}'


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
  """Run the body; if it fails in any process, raise that error in all.

  The body must not contain collective operations.
  """
  error = None
  try:
    yield
  except Exception as raised:
    error = raised
  raise_together(error)


def from_primary(make: Callable[[], Any]) -> Any:
  """Return to every process what `make` returns in process 0.

  If it fails, every process raises its error; see `raise_together`.

  Args:
    make: called only in process 0; its result must be serializable as JSON.

  Examples:
    >>> from_primary(lambda: [1, 2])
    [1, 2]
  """
  value = None
  with failing_together():
    if processes.is_primary():
      value = make()
  return all_gather(value)[0]


@contextlib.contextmanager
def primary_first() -> Iterator[None]:
  """Run the body in process 0, then in the other processes.

  For work that the first process does for all, such as preparing a dataset. If
  it fails in any process, all raise its error; see `raise_together`. The body
  must not contain collective operations.
  """
  if not processes.is_primary():
    raise_together(None)
  with failing_together():
    yield
  if processes.is_primary():
    raise_together(None)


def assert_equal(facts: Mapping[str, str]) -> None:
  """Check that all processes have the same facts as process 0.

  Raises:
    errors.InputError: in every process, if one differs; names the first that
      does and the facts in which it differs.
  """
  first, *others = all_gather(dict(facts))
  for index, other in enumerate(others, 1):
    differing = [
      f'{name} ({other.get(name)} instead of {first.get(name)})'
      for name in sorted(first.keys() | other.keys())
      if first.get(name) != other.get(name)
    ]
    if differing:
      processes.finish()
      raise errors.InputError(
        f'Process {index} differs from process 0 in {", ".join(differing)}. '
        'Run the same command with the same installation on every host.'
      )


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
  for piece in padded.reshape(-1, chunk):
    piece[:] = multihost_utils.broadcast_one_to_all(piece)
  ends = np.cumsum([leaf.nbytes for leaf in leaves])
  pieces = np.split(padded.view(np.uint8), ends)
  received = [
    piece.copy().view(leaf.dtype).reshape(leaf.shape)
    for piece, leaf in zip(pieces, leaves)
  ]
  return jax.tree.unflatten(structure, received)
