"""Several processes that run as one: a common start and a common end.

A process that fails publishes its failure, and all processes exit. Otherwise
the others would wait for it in a collective operation forever. With a single
process, every function here does nothing or returns the trivial answer.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import ctypes
import dataclasses
import itertools
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

import jax

from nfnet_jax import errors
from nfnet_jax.distributed import cluster

_HEARTBEATS, _FAILURES = 'nfnet_jax/heartbeats', 'nfnet_jax/failures'
_HEARTBEAT_SECONDS = 1.0
# The largest timeout of a heartbeat, JAX's own default. Imports and
# compilations delay heartbeats.
_MAX_HEARTBEAT_TIMEOUT = 100
# A failed process exits after the others have read the reason. Process 0, which
# holds the key-value store, exits after all others.
_GRACE_PERIOD = 3 * _HEARTBEAT_SECONDS
_GRACE_PERIOD_OF_PRIMARY = 6 * _HEARTBEAT_SECONDS
# For JAX's shutdown barrier, which all processes reach at the same time.
_SHUTDOWN_TIMEOUT = 30
# A week. The heartbeat monitor ends a wait for a lost process.
NO_TIMEOUT_MS = 7 * 24 * 3600 * 1000
_RESUME = 'The same command on all hosts resumes from the last checkpoint.'

EXIT_FAILED = 1


@dataclasses.dataclass
class ProcessGroup:
  """The processes of a run, as one of them sees them.

  Attributes:
    client: JAX's client of the key-value store that all processes share.
    index: this process's number, from 0.
    count: the number of processes.
    keys: numbers of the exchanges between processes, for unique keys.
    monitor: the thread that watches the other processes.
  """

  client: Any
  index: int
  count: int
  keys: Iterator[int] = dataclasses.field(default_factory=itertools.count)
  monitor: _HeartbeatMonitor | None = None


_process_group: ProcessGroup | None = None


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
    num_processes: the number of processes; with 1 this process joins no others,
      on any cluster.
    process_id: the number of this process, from 0.
    timeout: seconds to wait for the other processes. If they do not start or
      cannot be joined, this process exits with a message. Afterwards it is the
      timeout of heartbeats, at most 100 seconds.

  Raises:
    ValueError: if some but not all of the arguments are given, or a scheduler
      has started several processes that JAX does not find.
  """
  if num_processes == 1:
    return
  arguments = coordinator, num_processes, process_id
  if arguments != (None,) * 3:
    cluster.check(*arguments)
    assert coordinator is not None  # Checked above.
    if process_id == 0 and (error := cluster.port_error(coordinator)):
      _exit_process(error, EXIT_FAILED)
  elif not cluster.may_have_others():
    return
  with _exit_on_abort():
    _initialize(coordinator, num_processes, process_id, timeout)


def process_group() -> ProcessGroup | None:
  """Return the process group, or None for a single process."""
  return _process_group


def is_primary() -> bool:
  """Return whether this is process 0, the only one that writes files."""
  return _process_group is None or _process_group.index == 0


def are_several() -> bool:
  """Return whether there are other processes."""
  return _process_group is not None


def finish() -> None:
  """Wait until every process is done; call it before a normal exit."""
  global _process_group
  if _process_group is None:
    return
  _process_group.client.wait_at_barrier('nfnet_jax/finish', NO_TIMEOUT_MS)
  assert _process_group.monitor is not None
  _process_group.monitor.stop()
  _process_group = None
  jax.distributed.shutdown()


def fail(message: str, exit_code: int = EXIT_FAILED, details: str = '') -> None:
  """Make all processes exit with a message; return if there is only one.

  This process exits at once: the normal exit would wait for processes that wait
  for this one.

  Args:
    message: one line that every process prints.
    exit_code: the exit code of every process.
    details: printed before the message, only by this process.
  """
  if _process_group is None:
    return
  _publish_failure(message, exit_code)
  _exit_process(message, exit_code, _GRACE_PERIOD, details)


def await_failure() -> None:
  """Wait until the failure of another process ends this one."""
  time.sleep(_MAX_HEARTBEAT_TIMEOUT)
  fail(f'Another process failed without a message. {_RESUME}')


@contextlib.contextmanager
def exit_after(seconds: float, message: str) -> Iterator[None]:
  """Make all processes exit, even a single one, if the body takes too long.

  Args:
    seconds: the time limit of the body.
    message: printed before the exit.
  """
  timer = threading.Timer(seconds, _fail_or_exit, (message,))
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _fail_or_exit(message: str) -> None:
  fail(message)
  _exit_process(message, EXIT_FAILED)


def explain(error: BaseException) -> str:
  """Return one line about an error, naming the loss of a process as such."""
  line = f'{type(error).__name__}: {errors.first_line(error)}'
  return f'Lost another process ({line}). {_RESUME}' if 'Gloo' in line else line


def _publish_failure(message: str, exit_code: int) -> None:
  """Write a failure to the key-value store, for the other processes."""
  with contextlib.suppress(Exception):  # Process 0 may be the one that died.
    assert _process_group is not None
    key = f'{_FAILURES}/{_process_group.index}'
    _process_group.client.key_value_set(key, f'{exit_code} {message}')


@contextlib.contextmanager
def _exit_on_abort() -> Iterator[None]:
  """Exit with a message where JAX aborts, once there is a process group.

  JAX aborts as soon as process 0 is gone, and its callback for that cannot be
  set from Python. Collectives on CPUs sometimes abort when a peer is gone.
  """
  c_signal = ctypes.CDLL(None).signal
  c_signal.restype = ctypes.c_void_p
  c_signal.argtypes = ctypes.c_int, ctypes.c_void_p
  handler = ctypes.cast(_on_abort, ctypes.c_void_p)
  previous = c_signal(signal.SIGABRT, handler)
  try:
    yield
  finally:
    if _process_group is None:
      c_signal(signal.SIGABRT, previous)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
  """Handle SIGABRT in the thread that aborts, which does not hold the GIL."""
  message = f'The runtime aborted, as it does after losing a process. {_RESUME}'
  if _process_group is not None:
    # In another thread: this one may be the one that receives the answer.
    publisher = threading.Thread(
      target=_publish_failure, args=(message, EXIT_FAILED)
    )
    publisher.start()
    publisher.join(_GRACE_PERIOD)
  _exit_process(message, EXIT_FAILED)


_exit_lock = threading.Lock()


def _exit_process(
  message: str, exit_code: int, grace_period: float = 0, details: str = ''
) -> NoReturn:
  """Print a message and exit at once; later calls in other threads block."""
  if not _exit_lock.acquire(blocking=False):
    threading.Event().wait()  # Later failures follow from the first one.
  try:
    # The reader of the output may be gone.
    with contextlib.suppress(OSError, ValueError):
      print(f'{details}nfnet_jax: {message}', file=sys.stderr, flush=True)
    with contextlib.suppress(OSError, ValueError):
      sys.stdout.flush()
    if _process_group is not None:
      time.sleep(_GRACE_PERIOD_OF_PRIMARY if is_primary() else grace_period)
  finally:
    os._exit(exit_code)


def _initialize(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  timeout: float,
) -> None:
  """Start JAX's coordination service; set the process group if needed."""
  global _process_group
  heartbeat_timeout = min(timeout, _MAX_HEARTBEAT_TIMEOUT)
  address = coordinator, num_processes, process_id
  try:
    # This timeout ends before JAX's, which abort with a stack trace.
    with exit_after(timeout, cluster.timeout_message(*address, timeout)):
      jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=int(timeout) + 60,
        heartbeat_timeout_seconds=int(heartbeat_timeout) + 60,
        shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
        cluster_detection_method=None if coordinator is None else 'deactivate',
      )
  except ValueError as error:
    if coordinator or 'coordinator_address' not in str(error):
      raise
    if variables := cluster.scheduler_variables():
      raise ValueError(cluster.not_found_message(variables)) from error
    return  # A TPU without other hosts.
  except RuntimeError as error:
    # Not a normal exit, which may crash if JAX is only partly initialised.
    _exit_process(cluster.join_error_message(error), EXIT_FAILED)
  from jax._src import distributed  # JAX has no public access to the client.

  state = distributed.global_state
  if state.num_processes == 1:
    return
  group = ProcessGroup(state.client, state.process_id, state.num_processes)
  _process_group = group
  group.monitor = _HeartbeatMonitor(group, heartbeat_timeout)
  group.monitor.start()


class _HeartbeatMonitor(threading.Thread):
  """Exit this process once another one has failed or stopped its heartbeat."""

  def __init__(self, process_group: ProcessGroup, timeout: float):
    super().__init__(daemon=True)
    self._process_group = process_group
    self._timeout = timeout
    self._stopped = threading.Event()
    # Process -> its last heartbeat, and when this process first saw it.
    self._last: dict[int, tuple[str | None, float]] = {}

  def stop(self) -> None:
    self._stopped.set()
    self.join()

  def run(self) -> None:
    for number in itertools.count():
      if self._stopped.wait(_HEARTBEAT_SECONDS):
        return
      # Calls to process 0 have no timeout, and may hang.
      timer = threading.Timer(self._timeout, self._lost_primary, ('it hangs',))
      timer.daemon = True
      timer.start()
      try:
        self._update(number)
      except Exception as error:
        self._lost_primary(errors.first_line(error))
      finally:
        timer.cancel()

  def _lost_primary(self, reason: str) -> None:
    _exit_process(f'Lost process 0 ({reason}). {_RESUME}', EXIT_FAILED)

  def _update(self, number: int) -> None:
    """Send a heartbeat; exit if another process has failed or sends none."""
    process_group, client = self._process_group, self._process_group.client
    key = f'{_HEARTBEATS}/{process_group.index}'
    client.key_value_set(key, str(number), allow_overwrite=True)
    for key, failure in client.key_value_dir_get(_FAILURES):
      index = int(key.rpartition('/')[2])
      if index != process_group.index:
        exit_code, _, message = failure.partition(' ')
        _exit_process(
          f'Process {index} ended the run: {message}', int(exit_code)
        )
    now = time.monotonic()
    heartbeats = dict(client.key_value_dir_get(_HEARTBEATS))
    for index in range(process_group.count):
      # None if the process died before its first heartbeat.
      heartbeat = heartbeats.get(f'{_HEARTBEATS}/{index}')
      last, since = self._last.setdefault(index, (heartbeat, now))
      if heartbeat != last:
        self._last[index] = heartbeat, now
      elif now - since > self._timeout:
        fail(
          f'Process {index} of {process_group.count} has not answered for '
          f'{self._timeout:g} s. {_RESUME}'
        )
