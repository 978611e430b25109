"""Tables of settings: of one configuration, and of all of them for the docs.

python -m nfnet_jax.config.settings > docs/settings.md
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_collections

from nfnet_jax.config import base

_PAGE = """# Settings

Every setting of a configuration, with its value in the published ImageNet
recipe. `-` stands for a value that follows from others, or for a part that is
left out. Override a setting on the command line with `--config.NAME=VALUE`;
`--print_config` shows the values of one configuration and where each comes
from. Settings under `run` may change when a run is resumed.

This page is made by `python -m nfnet_jax.config.settings`.
"""


def sources(
  base_config: ml_collections.ConfigDict,
  file_config: ml_collections.ConfigDict,
  overrides: Mapping[str, Any],
  resolved: ml_collections.ConfigDict,
) -> dict[str, str]:
  """Return where the value of each setting comes from.

  Args:
    base_config: the defaults.
    file_config: what the config file returns.
    overrides: dotted names -> values, of the command line.
    resolved: the result.

  Returns:
    Name -> 'default', 'config', 'command line' or 'derived'.
  """
  defaults, given = base.flat(base_config), base.flat(file_config)
  found = {}
  for name, value in base.flat(resolved).items():
    if name in overrides:
      found[name] = 'command line'
    elif value != given[name]:
      found[name] = 'derived'
    else:
      found[name] = 'default' if value == defaults[name] else 'config'
  return found


def format_config(
  resolved: ml_collections.ConfigDict, origins: Mapping[str, str]
) -> str:
  """Return a line per setting: name, value, where it comes from, description.

  Settings that are unset and belong to other models are left out.
  """
  table, values = base.settings(), base.flat(resolved)
  rows = [
    (name, _text(values[name]), origins[name], setting.description)
    for name, setting in table.items()
    if values[name] is not None or not name.startswith('model.')
  ]
  widths = [max(len(row[i]) for row in rows) + 2 for i in range(3)]
  return '\n'.join(
    ''.join(f'{cell:<{w}}' for cell, w in zip(row, widths)) + row[3]
    for row in rows
  )


def format_page() -> str:
  """Return `docs/settings.md`."""
  lines = [_PAGE]
  section = None
  for name, setting in base.settings().items():
    first = name.rpartition('.')[0]
    if first != section:
      section = first
      lines.append(f'\n## {section or "The experiment"}\n')
      lines.append('| setting | default | allowed | description |')
      lines.append('| --- | --- | --- | --- |')
    allowed = setting.interval or ', '.join(setting.choices or ())
    lines.append(
      f'| `{name}` | {_text(setting.default)} | {allowed} '
      f'| {setting.description} |'
    )
  return '\n'.join(lines) + '\n'


def _text(value: Any) -> str:
  return '-' if value is None else str(value)


if __name__ == '__main__':
  print(format_page(), end='')
