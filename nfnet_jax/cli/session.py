"""What the doors share that run as several processes: flags, a common end."""

from collections.abc import Callable, Iterator
import contextlib
import traceback

from absl import flags

from nfnet_jax import errors
from nfnet_jax.cli import command

_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  'Where process 0 of several listens, HOST:PORT. Cloud TPU, GKE TPU and Slurm '
  'need no such flags; a plain host without them is alone.',
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'How many processes run this command.', lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Which of them this is, from 0.', lower_bound=0
)
_PEER_TIMEOUT = flags.DEFINE_float(
  'peer_timeout',
  300,
  'Seconds to wait for the other processes at the start, and (at most 100) '
  'for one that falls silent, before all end.',
  lower_bound=1,
)
_REQUIRE_PLATFORM = flags.DEFINE_enum(
  'require_platform',
  None,
  ['tpu', 'gpu', 'cpu'],
  'Refuses to run on devices of another kind.',
)
# As JAX calls the platforms of GPUs, and what it says of one for which nothing
# is installed, or that JAX_PLATFORMS leaves out.
_MAKES = {'gpu': ('cuda', 'rocm')}
_UNKNOWN = 'Unknown backend', 'not in the list of known backends'
# That devices take to start and to compile their first program.
_SECONDS_TO_START = 60
FLAGS = (
  'coordinator',
  'num_processes',
  'process_id',
  'peer_timeout',
  'require_platform',
)


@contextlib.contextmanager
def distributed_session() -> Iterator[Callable[[str], None]]:
  """Joins the other processes, if there are any, and ends with them.

  Yields:
    `command.log`, which speaks for all processes: those other than the first are
    silent. What goes wrong in one of them is said by all, and ends all.

  Raises:
    errors.InputError: if they do not fit together, or there are no devices of
      `--require_platform`.
    errors.RunError: if such devices do not start.
  """
  from nfnet_jax.distributed import collectives, environment, processes

  with _failing_together():
    _join()
    with errors.as_input_error():
      collectives.assert_equal(environment.describe())
    patience = _PEER_TIMEOUT.value + _SECONDS_TO_START
    line = f'The devices did not answer within {patience:g} s.'
    with processes.exit_after(patience, line):
      _check_devices()
    yield command.log if processes.is_primary() else lambda text: None
    processes.finish()


def _join() -> None:
  """Joins the other processes, and says so."""
  from nfnet_jax.distributed import processes

  with errors.as_input_error():
    processes.start(
      _COORDINATOR.value,
      _NUM_PROCESSES.value,
      _PROCESS_ID.value,
      timeout=_PEER_TIMEOUT.value,
    )
  # At once: what follows may hang where a host is not as the others.
  if (process_group := processes.process_group()) is not None:
    command.log(f'process    {process_group.index} of {process_group.count}')


@contextlib.contextmanager
def _failing_together() -> Iterator[None]:
  from nfnet_jax.distributed import processes

  try:
    yield
  except errors.InputError as error:
    processes.fail(command.one_line(error), command.EXIT_BAD_INPUT)
    raise
  except errors.RunError as error:
    processes.fail(command.one_line(error))
    raise
  except BaseException as error:
    processes.fail(
      processes.explain(error), command.EXIT_FAILED, traceback.format_exc()
    )
    raise


def _check_platform(required: str) -> None:
  """Checks that the devices are of the right kind.

  Raises:
    errors.RunError: if they do not start: busy ones may at another attempt.
    errors.InputError: if JAX knows of none.
  """
  import jax

  with _telling_busy_from_unknown():
    platform = jax.default_backend()
  if platform == required:
    return
  # JAX falls back on others in silence; asked by name, it says why.
  for name in _MAKES.get(required, [required]):
    with contextlib.suppress(errors.InputError), _telling_busy_from_unknown():
      jax.devices(name)
  raise errors.InputError(
    f'--require_platform={required}, but JAX found only {platform} devices. '
    f"See that JAX's {required} release is installed and that no other "
    'process holds the devices.'
  )


@contextlib.contextmanager
def _telling_busy_from_unknown() -> Iterator[None]:
  try:
    yield
  except RuntimeError as error:
    is_unknown = any(text in str(error) for text in _UNKNOWN)
    kind = errors.InputError if is_unknown else errors.RunError
    raise kind(f'--require_platform: {error}') from error


def _check_devices() -> None:
  """Checks that the devices are of the right kind and work together."""
  if required := _REQUIRE_PLATFORM.value:
    _check_platform(required)
  _check_count()


def _check_count() -> None:
  import jax

  from nfnet_jax.distributed import processes
  from nfnet_jax.training import data_parallel

  if not processes.are_several() and (count := jax.process_count()) > 1:
    raise errors.InputError(
      f'JAX computes on the devices of {count} processes here, which were not '
      'joined: leave out --num_processes, or compute alone with '
      'JAX_PLATFORMS=cpu.'
    )
  if processes.are_several():
    counted, expected = data_parallel.DataParallel().count(), jax.device_count()
    if counted != expected:
      raise errors.RunError(
        f'{counted} of {expected} devices answered. Start all processes anew; '
        'if that does not help, the hosts.'
      )
