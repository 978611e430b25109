"""Where the other processes of a job are, by what is said of them."""

import contextlib
import errno
import os
import re
import socket

import jax

from nfnet_jax import errors

# What a scheduler tells the processes of a job, as JAX's own detection reads
# it; on a Cloud TPU VM JAX sets its platforms, if the user did not.
_SIGNS = (
  'SLURM_STEP_NODELIST',
  'OMPI_MCA_orte_hnp_uri',
  'JOB_COMPLETION_INDEX',  # Kubernetes.
)
_FLAGS = '--coordinator=HOST:PORT, --num_processes=N and --process_id=I'


def check(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
  """Checks where a person says that the others are.

  Raises:
    ValueError: if that is no place, or half of one.
  """
  if None in (coordinator, num_processes, process_id):
    raise ValueError(
      f'Several processes need all of {_FLAGS}; a cluster that JAX knows, none.'
    )
  if not re.fullmatch(r'\S+:\d+', coordinator):
    raise ValueError(
      f'--coordinator={coordinator} is not HOST:PORT; any free port of process '
      f'0 will do, such as {coordinator.partition(":")[0]}:8476.'
    )
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f'--process_id={process_id} is not in [0, {num_processes}), '
      'the range of --num_processes.'
    )


def port_trouble(coordinator: str) -> str | None:
  """Says what to do where process 0 cannot listen, if it cannot.

  JAX, told to, crashes at times.
  """
  port = int(coordinator.rpartition(':')[2])
  with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind(('::', port))
    except (OSError, OverflowError) as error:
      # Which says that there is no IPv6.
      if getattr(error, 'errno', None) != errno.EADDRNOTAVAIL:
        return (
          f'Process 0 cannot listen at port {port} ({error}): name another in '
          '--coordinator.'
        )
  return None


def may_have_others() -> bool:
  """Whether to ask JAX; its detection may fail where no job is running."""
  return 'tpu' in (jax.config.jax_platforms or '') or bool(signs())


def signs() -> list[str]:
  """Returns the variables of a scheduler in the environment."""
  return [sign for sign in _SIGNS if sign in os.environ]


def not_found(found: list[str]) -> str:
  """Says what to do where a scheduler has signs but JAX finds nobody."""
  package = ''
  if 'JOB_COMPLETION_INDEX' in found:
    package = ' In Kubernetes it needs `pip install kubernetes`.'
  return (
    f'{found[0]} tells of a job of several processes, but JAX does not find '
    f'them.{package} Say where they are: {_FLAGS}; or --num_processes=1, if '
    'this one is alone.'
  )


def cannot_join(error: Exception) -> str:
  """Says what to do where JAX fails to join the others."""
  return (
    f'The processes cannot be joined ({errors.one_line(error)}). See '
    f'that they may; or say where they are: {_FLAGS}.'
  )


def timeout_message(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  timeout: float,
) -> str:
  """Says for whom a process has waited, and what to do."""
  who = 'the other processes of the job'
  if coordinator:
    who = f'the others of {num_processes} processes at {coordinator}'
    who = f'process {process_id}: {who}'
  return (
    f'Waited {timeout:g} s for {who}, in vain. Start the same command on every '
    'host, and see that they reach that of process 0.'
  )
