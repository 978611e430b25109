"""The flags `--config`, `--list_configs` and `--print_config`."""

from __future__ import annotations

from collections.abc import Sequence
import pathlib
from typing import Any

from absl import flags
import ml_collections
from ml_collections import config_flags

from nfnet_jax import errors
from nfnet_jax.config import base, lookup, settings, validate
from nfnet_jax.config import workdir as workdir_lib

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'Experiment: a name (see --list_configs) or the path of a Python file; '
  'NAME:ARG passes ARG to its get_config. Override a setting with '
  '--config.NAME=VALUE.',
)
LIST = flags.DEFINE_bool('list_configs', False, 'Print the known configs.')
PRINT = flags.DEFINE_bool(
  'print_config',
  False,
  'Print the resolved configuration: every setting with its value, where it '
  'comes from, and what it means.',
)
FLAGS = ('config', 'list_configs', 'print_config')


def get_config() -> ml_collections.ConfigDict:
  """Return the configuration of `--config` with its overrides.

  Raises:
    errors.InputError: if there is none, or not one with all settings.
  """
  if _CONFIG.value is None:
    known = ', '.join(lookup.config_table())
    raise errors.InputError(
      f'Give an experiment: --config=NAME. Known: {known}.'
    )
  validate.check_keys(_CONFIG.value)
  # Before weights are read to complete the configuration.
  validate.check_dataset(_CONFIG.value)
  return _CONFIG.value


def get_name() -> str:
  """Return the name of the configuration, without the folder of its file."""
  path, _, argument = _filename().partition(':')
  name = pathlib.Path(path).stem
  if argument in lookup.config_table() and pathlib.Path(path).parent == (
    lookup.FOLDER
  ):
    return argument
  return name + (argument and f':{argument}')


def get_overrides() -> dict[str, Any]:
  """Return the overrides of the command line: dotted names -> values."""
  return config_flags.get_override_values(flags.FLAGS['config'])


def _filename() -> str:
  flag: Any = flags.FLAGS['config']  # absl does not know its attributes.
  return flag.config_filename


def with_path(argv: Sequence[str]) -> list[str]:
  """Replace the name in `--config=NAME` by the path of its file.

  Raises:
    errors.InputError: if there is no such configuration.
  """
  argv = list(argv)
  for index, word in enumerate(argv):
    if word in ('--config', '-config') and index + 1 < len(argv):
      argv[index + 1] = lookup.find(argv[index + 1])
    elif word.startswith(('--config=', '-config=')):
      flag, name = word.split('=', 1)
      argv[index] = f'{flag}={lookup.find(name)}'
  return argv


def with_run_config(argv: Sequence[str]) -> list[str]:
  """Add the configuration of the run in `--workdir`, if none is given.

  Raises:
    errors.InputError: if the workdir cannot hold a run.
  """
  argv = list(argv)
  workdir = _flag_value(argv, 'workdir')
  if not workdir or _flag_value(argv, 'config'):
    return argv
  path = workdir_lib.parse_path(workdir)
  return [argv[0], f'--config={lookup.SAVED}:{path}', *argv[1:]]


def _flag_value(argv: Sequence[str], name: str) -> str | None:
  for word, following in zip(argv, [*argv[1:], None]):
    flag, equals, value = word.partition('=')
    if flag in (f'--{name}', f'-{name}'):
      return value if equals else following
  return None


def format_resolved() -> str:
  """Return the table that `--print_config` prints.

  Raises:
    errors.InputError: if the configuration is not valid.
  """
  from nfnet_jax.config import steps  # Orbax is slow to import.

  resolved = steps.prepare_config(get_config(), trains=False)
  origins = settings.sources(
    base.get_config(), lookup.load(_filename()), get_overrides(), resolved
  )
  return settings.format_config(resolved, origins)
