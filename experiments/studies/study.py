"""The command line of a study."""

from __future__ import annotations

import argparse
from collections.abc import Callable
import dataclasses
import os
import pathlib
import sys
import tempfile

import jax

from nfnet_jax import errors
from nfnet_jax.storage import files

VERDICT = 'verdict.txt'


@dataclasses.dataclass(frozen=True)
class Options:
  """How a study is made.

  Attributes:
    folder: of the results; what it contains is not measured again.
    quick: whether to make a few small measurements, which show that all works
      and answer nothing.
    workers: processes to use at a time.
  """

  folder: pathlib.Path
  quick: bool
  workers: int


def main(
  question: str, folder: pathlib.Path, answer: Callable[[Options], str]
) -> None:
  """Run a study's command: measure, draw, and write the verdict.

  Args:
    question: in one sentence.
    folder: of the study, where its results lie.
    answer: measures what the folder lacks, draws the figures there, and returns
      the verdict.
  """
  options = _parse(question, folder)
  # For the workers, which start later, and for this process.
  platforms = os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  jax.config.update('jax_platforms', platforms)
  print(question, flush=True)
  try:
    verdict = answer(options)
  except errors.InputError as error:
    print(errors.one_line(error), file=sys.stderr)
    sys.exit(2)
  files.write_atomically(options.folder / VERDICT, verdict + '\n')
  print(f'{verdict}\nResults: {options.folder}')


def _parse(question: str, folder: pathlib.Path) -> Options:
  parser = argparse.ArgumentParser(description=question)
  parser.add_argument(
    '--quick',
    action='store_true',
    help='make a few small measurements, which answer nothing',
  )
  parser.add_argument(
    '--out',
    type=pathlib.Path,
    help='folder of the results; what it contains is not measured again. By '
    "default the study's own, or a new one with --quick.",
  )
  parser.add_argument(
    '--workers',
    type=int,
    default=os.cpu_count(),
    help='processes at a time, each on one core (default: one per core)',
  )
  values = parser.parse_args()
  if values.out is None:
    values.out = pathlib.Path(tempfile.mkdtemp()) if values.quick else folder
  if values.workers < 1:
    parser.error('--workers must be at least 1.')
  try:
    values.out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    parser.error(f'--out={values.out} cannot be made a folder: {error}.')
  return Options(values.out, values.quick, values.workers)
