"""Several processes that run as one: a common start, a common end.

A process that fails tells the others, which would wait for it in a collective
for ever, and all of them end. A process alone needs none of this, and every
function here does the obvious for it.
"""

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
from typing import Any

import jax

from nfnet_jax import errors
from nfnet_jax.distributed import cluster

_BEATS, _FAILURES = 'nfnet_jax/beats', 'nfnet_jax/failures'
_SECONDS_A_BEAT = 1.0
# At most; as long as JAX's own default. Imports and compilations hold up beats.
_SILENCE = 100
# A failed process stays until the others have read why, and process 0, which
# holds what there is to read, until they have left.
_LINGER, _LINGER_OF_PRIMARY = 3 * _SECONDS_A_BEAT, 6 * _SECONDS_A_BEAT
# JAX's goodbye, to which all come at once.
_FAREWELL = 30
# Processes wait for one another as long as the watch lets them.
_FOREVER_MS = 7 * 24 * 3600 * 1000
_RESUME = 'The same command on all hosts resumes from the last checkpoint.'

EXIT_FAILED = 1


@dataclasses.dataclass
class ProcessGroup:
  """This process among several."""

  client: Any  # JAX's; a store of keys that all processes see.
  index: int
  count: int
  keys: Iterator[int] = dataclasses.field(default_factory=itertools.count)
  watch: '_Watch | None' = None


_process_group: ProcessGroup | None = None


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout: float = 300,
) -> None:
  """Joins the processes that run the same command, if there are others.

  To be called before anything touches a device. Without arguments JAX finds the
  others on Cloud TPU, GKE, Slurm, Open MPI and in an indexed Kubernetes job;
  elsewhere, and where `JAX_PLATFORMS` leaves out a VM's TPU, this process stays
  alone.

  Args:
    coordinator: HOST:PORT of process 0, on which it listens.
    num_processes: how many there are; 1 stays alone wherever it is.
    process_id: which one this is, from 0.
    timeout: seconds to wait for the others; where they do not come, or cannot
      be joined, this process ends with a line. Later it ends once one of them
      has been silent for as long, at most 100 seconds.

  Raises:
    ValueError: if some but not all of the arguments are given, or a scheduler
      has started several processes that JAX does not find.
  """
  if num_processes == 1:
    return
  arguments = coordinator, num_processes, process_id
  if arguments != (None,) * 3:
    cluster.check(*arguments)
    if process_id == 0 and (trouble := cluster.port_trouble(coordinator)):
      _end(trouble, EXIT_FAILED)
  elif not cluster.may_have_others():
    return
  with _explaining_aborts():
    _initialize(arguments, timeout)


def process_group() -> ProcessGroup | None:
  """Returns this process's place among the others, if there are any."""
  return _process_group


def is_primary() -> bool:
  """Whether this process is the one that writes."""
  return _process_group is None or _process_group.index == 0


def are_several() -> bool:
  """Whether there are other processes."""
  return _process_group is not None


def finish() -> None:
  """Waits until every process is done; call it before leaving in peace."""
  global _process_group
  if _process_group is None:
    return
  _process_group.client.wait_at_barrier('nfnet_jax/finish', _FOREVER_MS)
  _process_group.watch.stop()
  _process_group = None
  jax.distributed.shutdown()


def fail(line: str, exit_code: int = EXIT_FAILED, details: str = '') -> None:
  """Ends all processes, with a line; a process alone goes on.

  At once: the usual end would wait for processes that wait for this one.

  Args:
    line: what happened, for all.
    exit_code: of all of them.
    details: more of it, for this process's log.
  """
  if _process_group is None:
    return
  _tell(line, exit_code)
  _end(line, exit_code, _LINGER, details)


def await_failure() -> None:
  """Waits to be ended by another process that has failed."""
  time.sleep(_SILENCE)
  fail(f'Another process failed without a word. {_RESUME}')


@contextlib.contextmanager
def at_most(seconds: float, line: str) -> Iterator[None]:
  """Ends all processes, this one even if alone, if its body takes longer.

  Args:
    seconds: that it may take.
    line: what to say where they do not suffice.
  """
  timer = threading.Timer(seconds, _give_up, (line,))
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _give_up(line: str) -> None:
  fail(line)
  _end(line, EXIT_FAILED)


def explain(error: BaseException) -> str:
  """Returns a line on what went wrong, the end of another process included."""
  line = f'{type(error).__name__}: {errors.first_line(error)}'
  return f'Lost another process ({line}). {_RESUME}' if 'Gloo' in line else line


def _tell(line: str, exit_code: int) -> None:
  """Leaves word of a failure for the others."""
  with contextlib.suppress(Exception):  # Process 0 may be the one that died.
    key = f'{_FAILURES}/{_process_group.index}'
    _process_group.client.key_value_set(key, f'{exit_code} {line}')


@contextlib.contextmanager
def _explaining_aborts() -> Iterator[None]:
  """Ends with a line where JAX would abort, once processes are several.

  JAX aborts as soon as process 0 is gone, and what it calls then cannot be
  given from Python; collectives on CPUs abort at times when a peer is.
  """
  signal_of_c = ctypes.CDLL(None).signal
  signal_of_c.restype = ctypes.c_void_p
  signal_of_c.argtypes = ctypes.c_int, ctypes.c_void_p
  handler = ctypes.cast(_on_abort, ctypes.c_void_p)
  before = signal_of_c(signal.SIGABRT, handler)
  try:
    yield
  finally:
    if _process_group is None:
      signal_of_c(signal.SIGABRT, before)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
  """Called in the thread that aborts, which holds no lock of Python's."""
  line = f'The runtime aborted, as it does where a process is lost. {_RESUME}'
  if _process_group is not None:
    # In a thread of its own: this one may be what receives the answer.
    teller = threading.Thread(target=_tell, args=(line, EXIT_FAILED))
    teller.start()
    teller.join(_LINGER)
  _end(line, EXIT_FAILED)


_ending = threading.Lock()


def _end(
  line: str, exit_code: int, linger: float = 0, details: str = ''
) -> None:
  if not _ending.acquire(blocking=False):
    threading.Event().wait()  # What follows from the first failure is noise.
  try:
    # Who read what this process says may be gone.
    with contextlib.suppress(OSError, ValueError):
      print(f'{details}nfnet_jax: {line}', file=sys.stderr, flush=True)
    with contextlib.suppress(OSError, ValueError):
      sys.stdout.flush()
    if _process_group is not None:
      time.sleep(_LINGER_OF_PRIMARY if is_primary() else linger)
  finally:
    os._exit(exit_code)


def _initialize(arguments: tuple, timeout: float) -> None:
  """Starts JAX's coordination; there is a team if there are others."""
  global _process_group
  coordinator = arguments[0]
  silence = min(timeout, _SILENCE)
  try:
    # Sooner than JAX, which would abort with a stack trace.
    with at_most(timeout, cluster.timeout_message(*arguments, timeout)):
      jax.distributed.initialize(
        *arguments,
        initialization_timeout=int(timeout) + 60,
        heartbeat_timeout_seconds=int(silence) + 60,
        shutdown_timeout_seconds=_FAREWELL,
        cluster_detection_method=None if coordinator is None else 'deactivate',
      )
  except ValueError as error:
    if coordinator or 'coordinator_address' not in str(error):
      raise
    if signs := cluster.signs():
      raise ValueError(cluster.not_found(signs)) from error
    return  # A TPU without other hosts.
  except RuntimeError as error:
    # At once: what JAX has half started may crash as the interpreter ends.
    _end(cluster.cannot_join(error), EXIT_FAILED)
  from jax._src import distributed  # There is no public way to the client.

  state = distributed.global_state
  if state.num_processes == 1:
    return
  _process_group = ProcessGroup(
    state.client, state.process_id, state.num_processes
  )
  _process_group.watch = _Watch(_process_group, silence)
  _process_group.watch.start()


class _Watch(threading.Thread):
  """Ends this process once another has failed or fallen silent."""

  def __init__(self, process_group: ProcessGroup, silence: float):
    super().__init__(daemon=True)
    self._process_group = process_group
    self._silence = silence
    self._stopped = threading.Event()
    self._beats = {}  # Process -> its last beat, and when it was new here.

  def stop(self) -> None:
    self._stopped.set()
    self.join()

  def run(self) -> None:
    for beat in itertools.count():
      if self._stopped.wait(_SECONDS_A_BEAT):
        return
      # Process 0 is asked without a limit, and may hang.
      late = threading.Timer(self._silence, self._lost_primary, ('it hangs',))
      late.daemon = True
      late.start()
      try:
        self._look(beat)
      except Exception as error:
        self._lost_primary(errors.first_line(error))
      finally:
        late.cancel()

  def _lost_primary(self, reason: str) -> None:
    _end(f'Lost process 0 ({reason}). {_RESUME}', EXIT_FAILED)

  def _look(self, beat: int) -> None:
    process_group, client = self._process_group, self._process_group.client
    key = f'{_BEATS}/{process_group.index}'
    client.key_value_set(key, str(beat), allow_overwrite=True)
    for key, failure in client.key_value_dir_get(_FAILURES):
      index = key.rpartition('/')[2]
      if int(index) != process_group.index:
        exit_code, _, line = failure.partition(' ')
        _end(f'Process {index} ended all: {line}', int(exit_code))
    now, beats = time.monotonic(), dict(client.key_value_dir_get(_BEATS))
    for index in range(process_group.count):
      # Or it died before its first.
      value = beats.get(f'{_BEATS}/{index}')
      last, since = self._beats.setdefault(index, (value, now))
      if value != last:
        self._beats[index] = value, now
      elif now - since > self._silence:
        fail(
          f'Process {index} of {process_group.count} has not answered for '
          f'{self._silence:g} s. {_RESUME}'
        )
