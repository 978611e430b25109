"""Reasons why a plan cannot be made, each in one line."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import importlib.util
import re

import jax

from nfnet_jax import errors

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


class PlanError(ValueError):
  """A plan cannot be made; one line with the reason and what to do."""


class DoesNotFitError(PlanError):
  """A program needs more memory than a device has.

  Attributes:
    needed: bytes, as reported by the compiler; rounded to about 10 MiB.
    available: bytes that a device has.
  """

  def __init__(self, needed: int, available: int):
    lacking = needed - available
    super().__init__(
      f'The program needs {needed / 2**30:.2f} GiB per device, and '
      f'{available / 2**30:.2f} GiB are available: {lacking / 2**30:.2f} GiB '
      'too much.'
    )
    self.needed = needed
    self.available = available


@contextlib.contextmanager
def translate_libtpu_errors(topology: str) -> Iterator[None]:
  """Raise what libtpu reports about a topology as a `PlanError`."""
  if importlib.util.find_spec('libtpu') is None:
    raise PlanError(
      'The TPU compiler is not installed. '
      "Run in your clone: pip install '.[plan]'."
    )
  try:
    yield
  except (RuntimeError, ValueError) as error:
    message = errors.one_line(error)
    if 'lockfile' in message or 'already in use' in message:
      raise PlanError(
        'Another process holds libtpu (/tmp/libtpu_lockfile). Wait until it '
        'ends, or set ALLOW_MULTIPLE_LIBTPU_LOAD=1 to compile at the same time.'
      ) from error
    raise PlanError(
      f"libtpu does not support the topology '{topology}': {message}"
    ) from error


@contextlib.contextmanager
def translate_compiler_errors() -> Iterator[None]:
  """Raise the compiler's 'out of memory' as a `DoesNotFitError`."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    sizes = read_shortage(str(error))
    if sizes is None:
      raise
    raise DoesNotFitError(*sizes) from error


def read_shortage(message: str) -> tuple[int, int] | None:
  """Read (needed, available) bytes from the compiler's message.

  Returns:
    The two sizes, or None if the message is not about memory.

  Examples:
    >>> read_shortage('Ran out of memory. Used 2.5G of 1.5G hbm.')
    (2684354560, 1610612736)
  """
  number = r'([\d.]+)([KMGT]?)'
  found = re.search(rf'Used {number} of {number} hbm', message) or re.search(
    rf'\({number}\) exceeds available HBM \({number}\)', message
  )
  if not found:
    return None
  needed, unit, available, available_unit = found.groups()
  return (
    int(float(needed) * _UNITS[unit]),
    int(float(available) * _UNITS[available_unit]),
  )
