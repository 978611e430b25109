"""Compiled programs, kept for the next start by JAX's persistent cache."""

import os
import tempfile

import jax

from nfnet_jax.distributed import collectives, processes
from nfnet_jax.storage import files


def enable_compilation_cache() -> str | None:
  """Has JAX keep what it compiles, and look there first.

  JAX's own `JAX_COMPILATION_CACHE_DIR` says where. Without it programs for TPUs
  and GPUs go to `~/.cache/nfnet_jax/programs`; CPUs keep none, as JAX rejects
  kept programs on some of them (jax#38445). To be called by all processes,
  before anything long is compiled: process 0 alone writes, so that others gain
  only from a folder that they see too. Where they do not, none uses it, for on
  GPUs processes that compile may wait for those that do not.

  Returns:
    The folder, or why programs are not kept, for the log; None on a CPU.

  Raises:
    ValueError: if processes are told to keep them in different kinds of places.
  """
  folder = jax.config.jax_compilation_cache_dir
  if folder is None and jax.default_backend() != 'cpu':
    folder = str(files.cache_folder('programs'))
  # What they exchange next depends on it.
  collectives.assert_equal({'JAX_COMPILATION_CACHE_DIR': _kind(folder)})
  if not folder:
    return None
  trouble = None if files.is_in_bucket(folder) else _trouble(folder)
  jax.config.update('jax_compilation_cache_dir', None if trouble else folder)
  return f'not kept: {trouble}' if trouble else folder


def _kind(folder: str | None) -> str:
  if not folder:
    return 'none'
  return folder if files.is_in_bucket(folder) else 'a local folder'


def _trouble(folder: str) -> str | None:
  """Returns why a local folder will not do, if it will not."""
  mark, trouble = collectives.from_primary(lambda: _mark(folder))
  if trouble:
    return trouble
  seen = collectives.all_true(os.path.exists(mark))
  if processes.is_primary():
    os.unlink(mark)
  if not seen:
    return (
      f'not all hosts see {folder}; JAX_COMPILATION_CACHE_DIR names one that '
      'they share, or a bucket.'
    )
  return None


def _mark(folder: str) -> tuple[str, str | None]:
  """Makes a file in a folder; returns its name, or what went wrong."""
  try:
    os.makedirs(folder, exist_ok=True)
    handle, path = tempfile.mkstemp(prefix='.seen_', dir=folder)
  except OSError as error:
    return '', f'{error}.'
  os.close(handle)
  return path, None
