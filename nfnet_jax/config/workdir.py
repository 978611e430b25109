"""The configuration and the class names that a workdir stores."""

from __future__ import annotations

from collections.abc import Sequence
import json
import pathlib
import re
from typing import Any

from etils import epath
import ml_collections

from nfnet_jax import errors
from nfnet_jax.config import base, fast_paths
from nfnet_jax.storage import failures, files, run_files


class _DamagedError(ValueError):
  """The text of a file is not a configuration that was saved."""


def parse_path(name: str) -> epath.Path:
  """Return the absolute path of a workdir.

  Args:
    name: a local folder, or gs://BUCKET/FOLDER.

  Raises:
    errors.InputError: if it is neither, or a file is in its place.
  """
  if not files.is_in_bucket(name):
    path = pathlib.Path(name).resolve()
    for folder in (path, *path.parents):
      if folder.is_file():
        raise errors.InputError(
          f"--workdir='{name}': {folder} is a file. Name a folder."
        )
    return epath.Path(path)
  if not re.match('gs://[^/]', name):
    raise errors.InputError(
      f"--workdir='{name}' is neither a local folder nor gs://BUCKET/FOLDER."
    )
  return epath.Path(name)


def save(
  config: ml_collections.ConfigDict,
  workdir: epath.PathLike,
  class_names: Sequence[str],
) -> None:
  """Write `WORKDIR/config.json` and `WORKDIR/classes.txt`.

  Raises:
    errors.InputError: if the workdir can never be written.
    errors.RunError: if it cannot be written now, for example on a full disk.
  """
  folder = epath.Path(workdir)
  text = json.dumps(config.to_dict(), indent=2) + '\n'
  with failures.as_command_error():
    with failures.as_os_error(f'Making {folder}'):
      folder.mkdir(parents=True, exist_ok=True)
    names = '\n'.join(class_names) + '\n'
    files.write_atomically(folder / run_files.CLASSES, names)
    files.write_atomically(folder / run_files.CONFIG, text)


def is_run(workdir: epath.PathLike) -> bool:
  """Return whether a workdir holds a run that this process can see.

  Raises:
    errors.InputError: if it can never be read, or lacks its configuration.
    errors.RunError: if it cannot be read now.
  """
  path = epath.Path(workdir) / run_files.CONFIG
  checkpoints = epath.Path(workdir) / run_files.CHECKPOINTS
  with failures.as_command_error():
    if failures.read(f'Reading {path}', path.exists):
      return True
    has_state = failures.read(
      f'Listing {checkpoints}',
      lambda: checkpoints.exists() and any(checkpoints.iterdir()),
    )
  if has_state:
    raise errors.InputError(
      f"'{workdir}' has checkpoints but no {path.name}. Restore the file, or "
      'use another --workdir.'
    )
  return False


def load(workdir: epath.PathLike) -> ml_collections.ConfigDict:
  """Read the configuration that a run was begun with.

  Settings that did not exist then have their defaults.

  Raises:
    errors.InputError: if there is none, or it can never be read.
    errors.RunError: if it cannot be read now.
  """
  if not is_run(workdir):
    raise errors.InputError(
      f"'{workdir}' holds no run: it has no {run_files.CONFIG}. Name the "
      'folder of one.'
    )
  path = epath.Path(workdir) / run_files.CONFIG
  with failures.as_command_error():
    text = failures.read(f'Reading {path}', path.read_bytes)
  try:
    return _parse(text)
  except _DamagedError as error:
    raise errors.InputError(
      f"'{path}' cannot be used: {error}. Restore the file, or use another "
      '--workdir.'
    ) from error


def _parse(text: bytes) -> ml_collections.ConfigDict:
  config = base.get_config()
  try:
    saved = ml_collections.ConfigDict(_upgrade(json.loads(text)))
    for name in base.flat(saved):
      if name not in base.settings():
        raise _DamagedError(f"this version has no setting '{name}'")
    config.update(saved)
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise _DamagedError('it is not JSON') from error
  except (AttributeError, KeyError, TypeError) as error:
    raise _DamagedError('it is not the configuration of a run') from error
  return config


def _upgrade(saved: dict[str, Any]) -> dict[str, Any]:
  """Return a saved configuration of nfnet_jax 0.1.0 in today's settings.

  There each fast path was a separate setting, and `model.cross_replica_bn` was
  False where it is now unset.
  """
  run, model = saved['run'], saved['model']
  old = [name for name in fast_paths.FAST_PATHS if name in run]
  if old:
    run['fast_paths'] = fast_paths.join([name for name in old if run.pop(name)])
  if model.get('cross_replica_bn') is False:
    model['cross_replica_bn'] = None
  return saved
