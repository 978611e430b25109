"""Finds configurations by name."""

from __future__ import annotations

import ast
from collections.abc import Mapping
import functools
import importlib
import pathlib
import runpy
import traceback
from typing import Any

import ml_collections

from nfnet_jax import errors
from nfnet_jax.config import validate

_PACKAGE = 'nfnet_jax.experiments.configs'
FOLDER = pathlib.Path(__file__).parents[1] / 'experiments' / 'configs'
# The config file that reads the configuration of a run; see `saved`.
SAVED = pathlib.Path(__file__).parent / 'saved.py'


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
  if name not in table:
    raise errors.InputError(
      f"Unknown config '{name}'.{errors.did_you_mean(name, list(table))} "
      f'Known: {", ".join(table)}.'
    )
  place, _ = table[name]
  if argument and ':' in place:
    raise errors.InputError(f"The config '{name}' takes no argument.")
  return place + colon + argument


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
  except (TypeError, ValueError) as error:
    raise errors.InputError(str(error)) from error
  except Exception as error:
    raise raised_by_file(error) from error
  with errors.as_input_error(KeyError):
    config.update_from_flattened_dict(dict(overrides or {}))
  validate.check_keys(config)
  return config


def without_get_config(path: str) -> errors.InputError:
  """Return the error of a config file that has no `get_config`."""
  return errors.InputError(f"'{path}' defines no get_config().")


def raised_by_file(error: Exception) -> errors.InputError:
  """Return the error of a config file that raised another, and where."""
  place = traceback.extract_tb(error.__traceback__)[-1]
  message = f'{type(error).__name__}: {error}'
  return errors.InputError(f'{place.filename}:{place.lineno}: {message}')
