"""What a workdir keeps of its run's configuration."""

from collections.abc import Sequence
import json
import os

from etils import epath
import ml_collections

from nfnet_jax import errors
from nfnet_jax.config import base as config_lib
from nfnet_jax.storage import failures, files

_FILE = 'config.json'
_CLASSES = 'classes.txt'


def save(
  config: ml_collections.ConfigDict,
  workdir: os.PathLike,
  class_names: Sequence[str],
) -> None:
  """Writes `WORKDIR/config.json`, and the classes' names to `classes.txt`.

  Raises:
    errors.InputError: if the workdir can never be written.
    errors.RunError: if it cannot be written now, for want of space perhaps.
  """
  workdir = epath.Path(workdir)
  text = json.dumps(config.to_dict(), indent=2) + '\n'
  with failures.as_command_error():
    with failures.as_os_error(f'Making {workdir}'):
      workdir.mkdir(parents=True, exist_ok=True)
    files.write_atomically(workdir / _CLASSES, '\n'.join(class_names) + '\n')
    files.write_atomically(workdir / _FILE, text)


def is_run(workdir: os.PathLike) -> bool:
  """Whether a workdir holds a run, as far as this process sees.

  Raises:
    errors.InputError: if it can never be read.
    errors.RunError: if it cannot be read now.
  """
  path = epath.Path(workdir) / _FILE
  with failures.as_command_error(), failures.as_os_error(f'Reading {path}'):
    return path.exists()


def load(workdir: os.PathLike) -> ml_collections.ConfigDict:
  """Reads the configuration that a workdir was made with.

  Raises:
    errors.InputError: if there is none, or it can never be read.
    errors.RunError: if it cannot be read now.
  """
  if not is_run(workdir):
    raise errors.InputError(
      f"'{workdir}' holds no run: there is no {_FILE} in it."
    )
  path, config = epath.Path(workdir) / _FILE, config_lib.base()
  with failures.as_command_error(), failures.as_os_error(f'Reading {path}'):
    text = path.read_text()
  with errors.as_input_error(KeyError):
    config.update(json.loads(text))
  return config


def load_begun(
  workdir: os.PathLike, weights: str
) -> ml_collections.ConfigDict | None:
  """Reads the configuration of a run that began with these weights, if any."""
  if not is_run(workdir):
    return None
  config = load(workdir)
  return config if config.weights == config_lib.absolute(weights) else None


def check_same(config: ml_collections.ConfigDict, workdir: os.PathLike) -> None:
  """Checks that a workdir holds no other experiment than this one.

  Raises:
    errors.InputError: with the keys that differ.
  """
  if not is_run(workdir):
    return
  before, now = config_lib.flat(load(workdir)), config_lib.flat(config)
  differing = [
    f'{key}: {before.get(key)} there, {now.get(key)} here'
    for key in sorted(before.keys() | now.keys())
    if not key.startswith('run.') and before.get(key) != now.get(key)
  ]
  if differing:
    raise errors.InputError(
      f"'{workdir}' holds another experiment ({'; '.join(differing)}). Use "
      'another --workdir, or the same settings.'
    )
