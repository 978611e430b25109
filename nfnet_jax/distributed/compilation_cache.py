"""JAX's persistent compilation cache, shared by all processes of a run."""

from __future__ import annotations

import os
import tempfile

import jax

from nfnet_jax.distributed import collectives, processes
from nfnet_jax.storage import files


def enable_compilation_cache() -> str | None:
  """Make JAX store compiled programs and reuse them in the next run.

  `JAX_COMPILATION_CACHE_DIR`, JAX's own variable, names the folder. The default
  is `~/.cache/nfnet_jax/programs` for TPUs and GPUs. On CPUs nothing is stored
  by default, as JAX rejects stored programs on some of them (jax#38445).

  All processes must call it before they compile anything large. Only process 0
  writes, so the other processes gain only from a folder that they share with
  it. If they do not share it, no process uses the cache: on GPUs, processes
  that compile may wait for processes that do not.

  Returns:
    The folder, or the reason why programs are not stored, for the log; None if
    there is no cache, as on a CPU.

  Raises:
    errors.InputError: if the processes are configured with different folders.
  """
  folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
  if folder is None and jax.default_backend() != 'cpu':
    folder = str(files.cache_folder('programs'))
  # The exchanges below depend on the folder, so it must be of the same kind.
  collectives.assert_equal({'JAX_COMPILATION_CACHE_DIR': _kind(folder)})
  if not folder:
    return None
  problem = None if files.is_in_bucket(folder) else _problem(folder)
  jax.config.update('jax_compilation_cache_dir', None if problem else folder)
  return f'not kept: {problem}' if problem else folder


def _kind(folder: str | None) -> str:
  if not folder:
    return 'none'
  return folder if files.is_in_bucket(folder) else 'a local folder'


def _problem(folder: str) -> str | None:
  """Return why the processes cannot use a local folder, or None."""
  name, problem = collectives.from_primary(lambda: _create_marker(folder))
  if problem:
    return problem
  is_shared = all(collectives.all_gather(os.path.exists(name)))
  if processes.is_primary():
    os.unlink(name)
  if is_shared:
    return None
  return (
    f'not all hosts see {folder}; set JAX_COMPILATION_CACHE_DIR to a folder '
    'that they share, or to a bucket.'
  )


def _create_marker(folder: str) -> tuple[str, str | None]:
  """Create a file in a folder; return its path and an error message or None."""
  try:
    os.makedirs(folder, exist_ok=True)
    handle, path = tempfile.mkstemp(prefix='.seen_', dir=folder)
  except OSError as error:
    return '', f'{error}.'
  os.close(handle)
  return path, None
