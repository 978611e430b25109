"""Several processes that run as one: a common start and a common end.

JAX's coordination service notices a lost process and aborts the others, within
the timeout of its heartbeats.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os
import sys
import threading
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from nfnet_jax import errors
from nfnet_jax.distributed import cluster

# JAX's own default, in seconds.
_MAX_HEARTBEAT_TIMEOUT = 100


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout: float = 300,
) -> None:
  """Join the processes that run the same command, if there are others.

  Must be called before anything uses a device. Without arguments JAX finds the
  other processes on Cloud TPU, GKE, Slurm, Open MPI and in an indexed
  Kubernetes job. Elsewhere, and where `JAX_PLATFORMS` excludes a VM's TPU, this
  process is the only one.

  Args:
    coordinator: HOST:PORT on which process 0 listens.
    num_processes: number of processes; with 1 this process joins no others.
    process_id: number of this process, from 0.
    timeout: seconds to wait for the other processes, before this one exits with
      a message; later, at most 100, for one that stops responding.

  Raises:
    errors.InputError: if the arguments are not valid, or a scheduler has
      started several processes that JAX does not find.
    errors.RunError: if the processes cannot be joined.
  """
  if num_processes == 1:
    return
  address = coordinator, num_processes, process_id
  if address != (None,) * 3:
    cluster.check(*address)
  elif not cluster.may_have_others():
    return
  message = (
    f'The other processes did not start within {timeout:g} s. Run the same '
    'command on every host, and check that all can reach that of process 0.'
  )
  try:
    # This timeout ends before JAX's, which aborts with a stack trace.
    with exit_after(timeout, message):
      jax.distributed.initialize(
        *address,
        initialization_timeout=int(timeout) + 60,
        heartbeat_timeout_seconds=int(min(timeout, _MAX_HEARTBEAT_TIMEOUT)),
        cluster_detection_method=None if coordinator is None else 'deactivate',
      )
  except ValueError as error:
    if coordinator or 'coordinator_address' not in str(error):
      raise
    cluster.check_not_scheduled()  # Otherwise it is a TPU of a single host.
  except RuntimeError as error:
    raise errors.RunError(
      f'The processes cannot be joined ({errors.one_line(error)}). Check that '
      'the hosts can connect and that the port of process 0 is free.'
    ) from error


def is_primary() -> bool:
  """Return whether this is process 0, the only one that writes files."""
  return jax.process_index() == 0


def are_several() -> bool:
  """Return whether there are other processes."""
  return jax.process_count() > 1


def finish() -> None:
  """Wait until all processes are done, and leave the process group.

  All call it before a normal exit, and before they raise an error together.
  """
  if jax.distributed.is_initialized():
    multihost_utils.sync_global_devices('nfnet_jax/finish')
    jax.distributed.shutdown()


def exit_alone(message: str, exit_code: int = 1) -> NoReturn:
  """Print a message and exit at once, without the other processes.

  A normal exit would wait for the others, which wait for this process in a
  collective operation. They end when they notice that it is gone.
  """
  try:
    # The reader of the output may be gone.
    with contextlib.suppress(OSError, ValueError):
      print(f'nfnet_jax: {message}', file=sys.stderr, flush=True)
    with contextlib.suppress(OSError, ValueError):
      sys.stdout.flush()
  finally:
    os._exit(exit_code)


@contextlib.contextmanager
def exit_after(seconds: float, message: str) -> Iterator[None]:
  """Exit with a message if the body, which may hang, takes too long."""
  timer = threading.Timer(seconds, exit_alone, (message,))
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()
