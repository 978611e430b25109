"""Configurations by name: `--config`, and where its files are."""

import ast
from collections.abc import Sequence
import pathlib
import runpy
import traceback

from absl import flags
import ml_collections
from ml_collections import config_flags

from nfnet_jax import errors
from nfnet_jax.cli import common_flags

_CONFIGS = pathlib.Path(__file__).parents[1] / 'experiments' / 'configs'

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'Experiment: a name (see --list_configs), or the path of a Python file; '
  'NAME:ARG passes ARG to its get_config. Override values with '
  '--config.KEY=VALUE.',
)
LIST = flags.DEFINE_bool('list_configs', False, 'Lists the known configs.')


def get_config() -> ml_collections.ConfigDict:
  """Returns the configuration of `--config`, with its overrides.

  Raises:
    errors.InputError: if none was given.
  """
  if _CONFIG.value is None:
    raise errors.InputError(
      f'Give an experiment: --config=NAME. Known: {", ".join(config_names())}.'
    )
  return _CONFIG.value


def get_config_name() -> str:
  """Returns `--config` as a person would write it, without its folder."""
  path, _, argument = flags.FLAGS['config'].config_filename.partition(':')
  return pathlib.Path(path).stem + (argument and f':{argument}')


def load_config(name: str) -> ml_collections.ConfigDict:
  """Returns another configuration, with the overrides of the command line.

  Args:
    name: what `--config` takes.

  Raises:
    errors.InputError: if there is none, or it takes no such argument or key.
  """
  path, _, argument = _expand(name).partition(':')
  try:
    get = runpy.run_path(path).get('get_config')
    if get is None:
      raise without_get_config(path)
    config = get(argument) if argument else get()
  except (TypeError, ValueError) as error:
    raise errors.InputError(str(error)) from error
  except Exception as error:
    raise raised_by_file(error) from error
  overrides = config_flags.get_override_values(flags.FLAGS['config'])
  with errors.as_input_error(KeyError):
    config.update_from_flattened_dict(overrides)
  return config


def without_get_config(path: str) -> errors.InputError:
  """Says what a config file lacks."""
  return errors.InputError(f"'{path}' defines no get_config().")


def raised_by_file(error: Exception) -> errors.InputError:
  """Says what a config file raised, which may be anything, and where."""
  place = traceback.extract_tb(error.__traceback__)[-1]
  said = f'{type(error).__name__}: {error}'
  return errors.InputError(f'{place.filename}:{place.lineno}: {said}')


def config_names() -> list[str]:
  """Lists the experiments that come with the package."""
  return sorted(
    path.stem for path in _CONFIGS.glob('*.py') if path.stem != '__init__'
  )


def config_table() -> str:
  """Formats each known config with the first line of its docstring."""
  lines = []
  for name in config_names():
    docstring = ast.get_docstring(ast.parse(config_path(name).read_text()))
    lines.append(f'{name:<16}{docstring.splitlines()[0]}')
  return '\n'.join(lines)


def config_path(name: str) -> pathlib.Path:
  """Returns the file of a config given by name or by path.

  Raises:
    errors.InputError: if there is none; the message lists the known.
  """
  path = pathlib.Path(name)
  if path.suffix == '.py':
    if not path.is_file():
      raise errors.InputError(f"There is no config file '{name}'.")
    return path
  if name not in config_names():
    names = config_names()
    raise errors.InputError(
      f"Unknown config '{name}'.{errors.did_you_mean(name, names)} Known: "
      f'{", ".join(names)}.'
    )
  return _CONFIGS / f'{name}.py'


def with_config_path(argv: Sequence[str]) -> list[str]:
  """Replaces the name in `--config=NAME[:ARG]` by the path of its file."""
  argv = list(argv)
  for index, word in enumerate(argv):
    if word in ('--config', '-config') and index + 1 < len(argv):
      argv[index + 1] = _expand(argv[index + 1])
    elif word.startswith(('--config=', '-config=')):
      flag, name = word.split('=', 1)
      argv[index] = f'{flag}={_expand(name)}'
  return argv


def with_saved_config(argv: list[str]) -> list[str]:
  """Puts the run's own configuration first, unless one is given."""
  workdir = _flag_value(argv, 'workdir')
  if _flag_value(argv, 'config') or not workdir:
    return argv
  # Here, for what a config raises is quoted with its place.
  common_flags.to_workdir(workdir)
  path = pathlib.Path(__file__).parent / 'saved.py'
  return [argv[0], f'--config={path}:{workdir}', *argv[1:]]


def _flag_value(argv: list[str], name: str) -> str | None:
  for word, following in zip(argv, [*argv[1:], None]):
    flag, equals, value = word.partition('=')
    if flag in (f'--{name}', f'-{name}'):
      return value if equals else following
  return None


def _expand(name: str) -> str:
  name, colon, argument = name.partition(':')
  return f'{config_path(name)}{colon}{argument}'
