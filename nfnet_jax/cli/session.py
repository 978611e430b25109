"""The start and the end of commands that may run as several processes."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import traceback
from typing import Any, NoReturn, TYPE_CHECKING

from absl import flags
import jax

from nfnet_jax import errors
from nfnet_jax.cli import command, config_flag
from nfnet_jax.distributed import collectives, environment, processes
from nfnet_jax.training import data_parallel

if TYPE_CHECKING:
  from nfnet_jax.config import experiment as experiment_lib

_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  'HOST:PORT on which process 0 listens. Cloud TPU, GKE TPU and Slurm need no '
  'such flags.',
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Number of processes of this command.', lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Index of this process, from 0.', lower_bound=0
)
_PEER_TIMEOUT = flags.DEFINE_float(
  'peer_timeout',
  300,
  'Seconds to wait for the other processes at the start, and (at most 100) for '
  'one that stops responding, before all end.',
  lower_bound=1,
)
_REQUIRE_PLATFORM = flags.DEFINE_enum(
  'require_platform',
  None,
  ['tpu', 'gpu', 'cpu'],
  'Refuse to run on devices of another kind.',
)
# JAX's names for GPU platforms, and its messages about a platform that is not
# installed, or that JAX_PLATFORMS leaves out.
_MAKES = {'gpu': ('cuda', 'rocm')}
_UNKNOWN = 'Unknown backend', 'not in the list of known backends'
# For devices to start and to compile their first program.
_SECONDS_TO_START = 60
FLAGS = (
  'coordinator',
  'num_processes',
  'process_id',
  'peer_timeout',
  'require_platform',
)


@contextlib.contextmanager
def distributed_session() -> Iterator[command.LogFn]:
  """Join the other processes, if there are any, and end with them.

  A process that fails alone exits at once, and the others when they notice.

  Yields:
    A function that logs in process 0 only.

  Raises:
    errors.InputError: if the processes do not fit together, or there are no
      devices of `--require_platform`.
    errors.RunError: if such devices do not start.
  """
  try:
    processes.start(
      _COORDINATOR.value,
      _NUM_PROCESSES.value,
      _PROCESS_ID.value,
      timeout=_PEER_TIMEOUT.value,
    )
    limit = _PEER_TIMEOUT.value + _SECONDS_TO_START
    message = f'The devices did not answer within {limit:g} s.'
    with processes.exit_after(limit, message):
      _check_devices()
    yield command.log if processes.is_primary() else lambda text: None
    processes.finish()
  except BaseException as error:
    if jax.distributed.is_initialized():
      _exit_alone(error)
    raise


def open_experiment(**options: Any) -> experiment_lib.Experiment:
  """Turn `--config` into an experiment, the same in all processes.

  Args:
    **options: those of `config.steps.open_experiment`.

  Raises:
    errors.InputError: if the configuration cannot be used, or the processes
      were given different ones.
  """
  from nfnet_jax.config import steps  # Orbax is slow to import.

  config = config_flag.get_config()
  facts = {
    f'--config.{name}': str(value)
    for name, value in config_flag.get_overrides().items()
  }
  collectives.assert_equal({'--config': config_flag.get_name(), **facts})
  return steps.open_experiment(config, **options)


def _exit_alone(error: BaseException) -> NoReturn:
  """Report an error and exit, while the other processes are still there."""
  if isinstance(error, errors.InputError):
    processes.exit_alone(errors.one_line(error), command.EXIT_BAD_INPUT)
  if isinstance(error, errors.RunError):
    processes.exit_alone(errors.one_line(error))
  line = f'{type(error).__name__}: {errors.first_line(error)}'
  # A lost process breaks the collectives of CPUs. Those of other devices hang
  # until JAX aborts.
  if 'Gloo' not in line:
    with contextlib.suppress(OSError, ValueError):  # Standard error is closed.
      traceback.print_exception(error)
    processes.exit_alone(line)
  processes.exit_alone(
    f'Lost another process ({line}). The same command on all hosts resumes '
    'from the last checkpoint.'
  )


def _check_devices() -> None:
  """Check that the devices are of the right kind and work together."""
  if _REQUIRE_PLATFORM.value:
    _check_platform(_REQUIRE_PLATFORM.value)
  count = jax.process_count()
  if not jax.distributed.is_initialized():
    if count == 1:
      return
    raise errors.InputError(
      f'JAX computes on the devices of {count} processes, which were not '
      'joined. Leave out --num_processes, or compute on this host only with '
      'JAX_PLATFORMS=cpu.'
    )
  command.log(f'process    {jax.process_index()} of {count}')
  # This exchange comes first: if versions differ, later ones may fail.
  collectives.assert_equal(environment.describe())
  counted, expected = data_parallel.DataParallel().count(), jax.device_count()
  if counted != expected:
    raise errors.RunError(
      f'{counted} of {expected} devices answered. Restart all processes; if '
      'that does not help, restart the hosts.'
    )


def _check_platform(required: str) -> None:
  """Check that the devices are of the right kind.

  Raises:
    errors.RunError: if they do not start; busy ones may at another attempt.
    errors.InputError: if JAX knows of none.
  """
  with _classified_backend_errors():
    platform = jax.default_backend()
  if platform == required:
    return
  # JAX falls back on other devices silently; asked by name, it gives a reason.
  for name in _MAKES.get(required, [required]):
    with contextlib.suppress(errors.InputError), _classified_backend_errors():
      jax.devices(name)
  raise errors.InputError(
    f'--require_platform={required}, but JAX found only {platform} devices. '
    f'Check that the {required} release of JAX is installed and that no other '
    'process holds the devices.'
  )


@contextlib.contextmanager
def _classified_backend_errors() -> Iterator[None]:
  """Raise bad input for a platform that JAX does not know, else `RunError`."""
  try:
    yield
  except RuntimeError as error:
    is_unknown = any(text in str(error) for text in _UNKNOWN)
    kind = errors.InputError if is_unknown else errors.RunError
    raise kind(f'--require_platform: {error}') from error
