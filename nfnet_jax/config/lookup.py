"""Find configurations by name."""

from __future__ import annotations

import ast
from collections.abc import Mapping
import difflib
import functools
import importlib
import inspect
import pathlib
import re
import runpy
import traceback
from typing import Any

import ml_collections

from nfnet_jax import errors
from nfnet_jax.config import base, fast_paths, validate

_PACKAGE = 'nfnet_jax.experiments.configs'
FOLDER = pathlib.Path(__file__).parents[1] / 'experiments' / 'configs'
# The config file that reads the configuration of a run; see `saved`.
SAVED = pathlib.Path(__file__).parent / 'saved.py'

# What people call settings elsewhere, or what earlier versions called them ->
# the setting.
SYNONYMS = {
  'lr': 'optimizer.learning_rate',
  'learning_rate': 'optimizer.learning_rate',
  'wd': 'optimizer.weight_decay',
  'weight_decay': 'optimizer.weight_decay',
  'clipping': 'optimizer.clipping',
  'momentum': 'optimizer.momentum',
  'epochs': 'train_for',
  'steps': 'train_for',
  'batch_size': 'batch_size',
  'bs': 'batch_size',
  'seed': 'seed',
  'model': 'model.name',
  'dropout': 'model.dropout_rate',
  'image_size': 'data.image_size',
  **dict.fromkeys(fast_paths.FAST_PATHS, 'run.fast_paths'),
}
# Where the value of a synonym is not a value of the setting.
_EXAMPLES = {
  'epochs': "'90 epochs'",
  'steps': "'1000 steps'",
  **dict.fromkeys(
    fast_paths.FAST_PATHS, 'LIST, a list of names, or auto, or none'
  ),
}
# Their frames do not show where a config file went wrong.
_LIBRARIES = {'absl', 'ml_collections'}


@functools.cache
def config_table() -> dict[str, tuple[str, str]]:
  """Return the configurations that come with the package.

  A config file gives one, under its own name, or several, whose names are the
  keys of its `CONFIGS`.

  Returns:
    Name -> where `find` leads, and one line for people.
  """
  table: dict[str, tuple[str, str]] = {}
  for path in sorted(FOLDER.glob('*.py')):
    if path.stem == '__init__':
      continue
    text = path.read_text()
    if '\nCONFIGS' in text:
      rows = importlib.import_module(f'{_PACKAGE}.{path.stem}').CONFIGS
      table |= {name: (f'{path}:{name}', line) for name, line in rows.items()}
    else:
      docstring = ast.get_docstring(ast.parse(text)) or ''
      table[path.stem] = str(path), docstring.partition('\n')[0]
  return table


def format_table() -> str:
  """Return a line for each configuration that comes with the package."""
  table = config_table()
  width = max(map(len, table)) + 2
  return '\n'.join(
    f'{name:<{width}}{line}' for name, (_, line) in table.items()
  )


def find(name: str) -> str:
  """Return the file of a configuration, and the argument for it.

  Args:
    name: as `--config` takes it: NAME or PATH.py, and :ARG if it takes one.

  Returns:
    `PATH.py` or `PATH.py:ARG`.

  Raises:
    errors.InputError: if there is none; the message lists the known ones.
  """
  name, colon, argument = name.partition(':')
  if name.endswith('.py'):
    if not pathlib.Path(name).is_file():
      raise errors.InputError(f"There is no config file '{name}'.")
    return name + colon + argument
  table = config_table()
  if name not in table and (pathlib.Path(name).suffix or '/' in name):
    raise errors.InputError(
      f"The config '{name}' is not a Python file. Give NAME or PATH.py."
    )
  if name not in table:
    raise errors.InputError(
      f"Unknown config '{name}'.{errors.did_you_mean(name, list(table))} "
      f'Known: {", ".join(table)}.'
    )
  place, _ = table[name]
  if argument and not _takes_argument(name, place):
    raise errors.InputError(f"The config '{name}' takes no argument.")
  return place + colon + argument


def _takes_argument(name: str, place: str) -> bool:
  if ':' in place:
    return False
  module = importlib.import_module(f'{_PACKAGE}.{name}')
  return bool(inspect.signature(module.get_config).parameters)


def load(
  name: str, overrides: Mapping[str, Any] | None = None
) -> ml_collections.ConfigDict:
  """Return a configuration with overrides.

  Args:
    name: see `find`.
    overrides: dotted names -> values.

  Raises:
    errors.InputError: if there is no such configuration, argument or setting.
  """
  path, _, argument = find(name).partition(':')
  try:
    get_config = runpy.run_path(path).get('get_config')
    if get_config is None:
      raise without_get_config(path)
    config = get_config(argument) if argument else get_config()
  except Exception as error:
    raise explain_file_error(error) from error
  with errors.as_input_error(KeyError):
    config.update_from_flattened_dict(dict(overrides or {}))
  validate.check_keys(config)
  return config


def without_get_config(path: str) -> errors.InputError:
  """Return the error of a config file that has no `get_config`."""
  return errors.InputError(f"'{path}' defines no get_config().")


def explain_file_error(error: Exception) -> errors.InputError:
  """Return the error of a config file in one line, with its place.

  The message of a `ValueError`, such as that of an unknown variant, needs none.
  """
  if isinstance(error, ValueError):
    return errors.InputError(str(error))
  if isinstance(error, SyntaxError):
    return errors.InputError(
      f'{error.filename}:{error.lineno}: SyntaxError: {error.msg}'
    )
  frames = traceback.extract_tb(error.__traceback__)
  is_ours = [
    not _LIBRARIES & set(pathlib.Path(frame.filename).parts) for frame in frames
  ]
  place = [frame for frame, ours in zip(frames, is_ours) if ours][-1]
  message = f'{type(error).__name__}: {error}'
  # ml_collections puts the name first, then the whole configuration.
  name = re.match(r'\W*(?:Key ")?(\w+)', str(error))
  is_key = isinstance(error, (AttributeError, KeyError)) and not is_ours[-1]
  if is_key and name:
    message = str(unknown_setting(name[1]))
  return errors.InputError(f'{place.filename}:{place.lineno}: {message}')


def unknown_setting(name: str, value: str = '') -> errors.InputError:
  """Return the error for a setting that does not exist.

  Args:
    name: as it was given, with or without its section.
    value: as it was given, if it was.
  """
  hint = suggest_setting(name, value) or ' --print_config lists all settings.'
  return errors.InputError(f"Unknown setting '{name}'.{hint}")


def suggest_setting(name: str, value: str = '') -> str:
  """Return a sentence with the setting that a name may mean, or ''.

  Examples:
    >>> suggest_setting('lr', '0.1')
    ' Use --config.optimizer.learning_rate=0.1.'
    >>> suggest_setting('optimizer.momentun')
    " Did you mean 'optimizer.momentum'?"
  """
  leaf = name.rpartition('.')[2]
  if setting := SYNONYMS.get(leaf):
    example = _EXAMPLES.get(leaf, value or 'VALUE')
    return f' Use --config.{setting}={example}.'
  names = {known.rpartition('.')[2]: known for known in base.settings()}
  near = difflib.get_close_matches(leaf, names, n=1)
  return f" Did you mean '{names[near[0]]}'?" if near else ''
