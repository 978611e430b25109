"""Tables of results, and the machine that they were measured on."""

from __future__ import annotations

import json
import pathlib
import platform

import jax
import pandas as pd

from nfnet_jax.storage import files

MACHINE = 'machine.json'


def read(path: pathlib.Path) -> pd.DataFrame:
  """Read a table; it is empty if there is no file."""
  if not path.exists():
    return pd.DataFrame()
  # Some labels are 'none', which pandas takes for a missing value.
  return pd.read_csv(path, keep_default_na=False, na_values=[''])


def write(path: pathlib.Path, table: pd.DataFrame) -> None:
  """Write a table."""
  text = table.to_csv(index=False, lineterminator='\n')
  files.write_atomically(path, text)


def write_machine(folder: pathlib.Path, core_minutes: float) -> None:
  """Write the time that a study took, and on what.

  Args:
    folder: of the results.
    core_minutes: minutes of computing, summed over cores.
  """
  machine = {
    'core_minutes': round(core_minutes, 1),
    'processor': _processor(),
    'jax': jax.__version__,
  }
  text = json.dumps(machine, indent=2) + '\n'
  files.write_atomically(folder / MACHINE, text)


def _processor() -> str:
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  names = [
    line.partition(':')[2].strip()
    for line in lines
    if line.startswith('model name')
  ]
  return names[0] if names else platform.processor() or platform.machine()
