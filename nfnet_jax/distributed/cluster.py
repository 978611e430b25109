"""The addresses of a job's processes: flags, schedulers and error messages."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket

import jax

from nfnet_jax import errors

# Variables that a scheduler sets for the processes of a job, and that JAX reads
# to find them.
_SCHEDULER_VARIABLES = (
  'SLURM_STEP_NODELIST',
  'OMPI_MCA_orte_hnp_uri',
  'JOB_COMPLETION_INDEX',  # Kubernetes.
)
_FLAGS = '--coordinator=HOST:PORT, --num_processes=N and --process_id=I'


def check(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
  """Check the addresses that the user gave.

  Raises:
    ValueError: if they are incomplete or not valid.
  """
  if coordinator is None or num_processes is None or process_id is None:
    raise ValueError(
      f'Several processes need all of {_FLAGS}. On a cluster that JAX detects, '
      'omit all three.'
    )
  if not re.fullmatch(r'\S+:\d+', coordinator):
    raise ValueError(
      f'--coordinator={coordinator} is not HOST:PORT. Any free port of process '
      f'0 will do, such as {coordinator.partition(":")[0]}:8476.'
    )
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f'--process_id={process_id} is not in [0, {num_processes}), '
      'the range of --num_processes.'
    )


def port_error(coordinator: str) -> str | None:
  """Return an error message if process 0 cannot listen on its port.

  The check is made because JAX may crash if the port is in use.
  """
  port = int(coordinator.rpartition(':')[2])
  with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind(('::', port))
    except (OSError, OverflowError) as error:
      # EADDRNOTAVAIL means that the host has no IPv6.
      if getattr(error, 'errno', None) != errno.EADDRNOTAVAIL:
        return (
          f'Process 0 cannot listen on port {port} ({error}). Choose another '
          'port in --coordinator.'
        )
  return None


def may_have_others() -> bool:
  """Return whether this may be one of several processes, which JAX can find.

  Elsewhere JAX must not be asked: its detection may fail where no job runs.
  """
  # On a Cloud TPU VM JAX sets its platforms, if the user did not.
  platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
  return 'tpu' in (platforms or '') or bool(scheduler_variables())


def scheduler_variables() -> list[str]:
  """Return the names of a scheduler's variables in the environment."""
  return [name for name in _SCHEDULER_VARIABLES if name in os.environ]


def not_found_message(variables: list[str]) -> str:
  """Return the error message for a scheduled job that JAX does not detect."""
  package = ''
  if 'JOB_COMPLETION_INDEX' in variables:
    package = ' In Kubernetes this needs `pip install kubernetes`.'
  return (
    f'{variables[0]} is set by a job of several processes, but JAX does not '
    f'find them.{package} Pass {_FLAGS}; or --num_processes=1 for a single '
    'process.'
  )


def join_error_message(error: Exception) -> str:
  """Return the error message for a failure of JAX to join the processes."""
  return (
    f'The processes cannot be joined ({errors.one_line(error)}). Check '
    f'that they can connect, or pass {_FLAGS}.'
  )


def timeout_message(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  timeout: float,
) -> str:
  """Return the error message for processes that did not start in time."""
  waiting, others = 'This process', 'the other processes of the job'
  if coordinator:
    waiting = f'Process {process_id}'
    others = f'the others of {num_processes} processes at {coordinator}'
  return (
    f'{waiting} waited {timeout:g} s for {others}. Start the same command on '
    'every host, and check that each host can reach the host of process 0.'
  )
