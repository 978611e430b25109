"""List the commands, or run one.

  nfnet train --config=digits --workdir=runs/digits

is `python -m nfnet_jax.experiments.train` with the same flags. So is
`python -m nfnet_jax train`, where the script `nfnet` is not on the path.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
import pathlib
import runpy
import sys

import nfnet_jax
from nfnet_jax import errors, experiments
from nfnet_jax.cli import command

_USAGE = """\
Usage: nfnet COMMAND [FLAGS]

{commands}

nfnet COMMAND --help describes a command and its flags.
nfnet --version prints the version."""


def main(argv: Sequence[str] | None = None) -> None:
  """Run the command that the command line names, with the rest of its words.

  Args:
    argv: the command line; by default that of the process.
  """
  argv = list(sys.argv if argv is None else argv)
  name, arguments = (argv[1], argv[2:]) if argv[1:] else ('--help', [])
  if name in ('-h', '--help', 'help'):
    with command.ending_with_reader():
      print(_USAGE.format(commands=_table()))
  elif name == '--version':
    print(nfnet_jax.__version__)
  elif name in _paths():
    module = f'{experiments.__name__}.{name}'
    sys.argv = [name, *arguments]
    runpy.run_module(module, run_name='__main__', alter_sys=True)
  else:
    command.log(
      f"nfnet_jax: There is no command '{name}'."
      f'{errors.did_you_mean(name, _paths())} nfnet --help lists them.'
    )
    sys.exit(command.EXIT_BAD_INPUT)


def _paths() -> dict[str, pathlib.Path]:
  """Return the file of every command by its name."""
  (folder,) = experiments.__path__
  return {
    path.stem: path for path in sorted(pathlib.Path(folder).glob('[a-z]*.py'))
  }


def _table() -> str:
  """Return the names of all commands, each with what it does."""
  paths = _paths()
  width = max(map(len, paths))
  return '\n'.join(
    f'  {name:<{width}}  {_summary(path)}' for name, path in paths.items()
  )


def _summary(path: pathlib.Path) -> str:
  """Return the first line of a module's docstring, without importing it."""
  text = ast.get_docstring(ast.parse(path.read_text())) or ''
  return text.partition('\n')[0]


if __name__ == '__main__':
  main()
