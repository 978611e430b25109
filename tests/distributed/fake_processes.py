"""Processes of one run, as threads that exchange values by a fake JAX."""

from concurrent import futures
import threading

import jax
from jax.experimental import multihost_utils
import numpy as np

_LIMIT = 60  # Seconds for the others to reach the same exchange.


def run(monkeypatch, *functions):
  """Call one function per process.

  Returns:
    What each returned, or the exception that it raised.
  """
  local = threading.local()
  barrier = threading.Barrier(len(functions))
  sent = [None] * len(functions)

  def gather(array):
    barrier.wait(_LIMIT)  # All have read what was sent before.
    sent[local.index] = np.array(array)
    barrier.wait(_LIMIT)
    return np.stack(sent)

  def call(index):
    local.index = index
    try:
      return functions[index]()
    except Exception as error:
      return error

  with (
    monkeypatch.context() as patch,
    futures.ThreadPoolExecutor(len(functions)) as threads,
  ):
    patch.setattr(jax, 'process_index', lambda: local.index)
    patch.setattr(jax, 'process_count', lambda: len(functions))
    patch.setattr(multihost_utils, 'process_allgather', gather)
    patch.setattr(
      multihost_utils, 'broadcast_one_to_all', lambda array: gather(array)[0]
    )
    return list(threads.map(call, range(len(functions))))
