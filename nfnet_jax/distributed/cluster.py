"""The addresses of a job's processes: from flags, or from a scheduler."""

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
    errors.InputError: if they are incomplete or not valid.
    errors.RunError: if this is process 0, and its port is in use.
  """
  if coordinator is None or num_processes is None or process_id is None:
    raise errors.InputError(
      f'Several processes need all of {_FLAGS}. On a cluster that JAX detects, '
      'omit all three.'
    )
  if not re.fullmatch(r'\S+:\d+', coordinator):
    raise errors.InputError(
      f'--coordinator={coordinator} is not HOST:PORT. Any free port of process '
      f'0 will do, such as {coordinator.partition(":")[0]}:8476.'
    )
  if not 0 <= process_id < num_processes:
    raise errors.InputError(
      f'--process_id={process_id} is not in [0, {num_processes}), '
      'the range of --num_processes.'
    )
  if process_id == 0:
    _check_port(coordinator)


def may_have_others() -> bool:
  """Return whether this may be one of several processes, which JAX can find.

  Elsewhere JAX must not be asked: its detection may fail where no job runs.
  """
  # On a Cloud TPU VM JAX sets its platforms, if the user did not.
  platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
  return 'tpu' in (platforms or '') or bool(_scheduler_variables())


def check_not_scheduled() -> None:
  """Check that JAX, which found no other processes, has not missed any.

  Raises:
    errors.InputError: if a scheduler started this process.
  """
  if variables := _scheduler_variables():
    raise errors.InputError(
      f'{variables[0]} is set by a job of several processes, but JAX does not '
      f'find them. Pass {_FLAGS}; or --num_processes=1 for a single process; '
      'in Kubernetes, `pip install kubernetes`.'
    )


def _scheduler_variables() -> list[str]:
  return [name for name in _SCHEDULER_VARIABLES if name in os.environ]


def _check_port(coordinator: str) -> None:
  """Check that no other program of this host listens on process 0's port.

  JAX would share the port with another JAX program, which would then abort.

  Raises:
    errors.RunError: if one does.
  """
  port = int(coordinator.rpartition(':')[2])
  with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind(('::', port))
    except (OSError, OverflowError) as error:
      # EADDRNOTAVAIL means that the host has no IPv6.
      if getattr(error, 'errno', None) != errno.EADDRNOTAVAIL:
        raise errors.RunError(
          f'Process 0 cannot listen on port {port} ({error}). Choose another '
          'port in --coordinator.'
        ) from error
