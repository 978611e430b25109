"""What keeps a plan from being made, each in one line."""

from collections.abc import Iterator
import contextlib
import importlib.util
import re

import jax

from nfnet_jax import errors

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


class PlanError(ValueError):
  """A plan cannot be made; one line that says what to do."""


class DoesNotFitError(PlanError):
  """A program needs more memory than a device has.

  Attributes:
    needed: bytes, as the compiler says; rounded to 10 MiB or so.
    available: bytes.
  """

  def __init__(self, needed: int, available: int):
    lacking = needed - available
    super().__init__(
      f'The program needs {needed / 2**30:.2f} GiB and has '
      f'{available / 2**30:.2f} GiB: {lacking / 2**30:.2f} GiB too much.'
    )
    self.needed = needed
    self.available = available


@contextlib.contextmanager
def of_libtpu(topology: str) -> Iterator[None]:
  """Turns what libtpu says when asked for a topology into one line."""
  if importlib.util.find_spec('libtpu') is None:
    raise PlanError(
      "The TPU compiler is not installed; run: pip install 'nfnet_jax[plan]'."
    )
  try:
    yield
  except (RuntimeError, ValueError) as error:
    said = errors.one_line(error)
    if 'lockfile' in said or 'already in use' in said:
      raise PlanError(
        'Another process holds libtpu (/tmp/libtpu_lockfile). Wait until it '
        'ends, or set ALLOW_MULTIPLE_LIBTPU_LOAD=1 to compile beside it.'
      ) from error
    raise PlanError(
      f"libtpu does not make the topology '{topology}': {said}"
    ) from error


@contextlib.contextmanager
def of_compiler() -> Iterator[None]:
  """Turns the compiler's 'out of memory' into `DoesNotFitError`."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    sizes = read_shortage(str(error))
    if sizes is None:
      raise
    raise DoesNotFitError(*sizes) from error


def read_shortage(message: str) -> tuple[int, int] | None:
  """Reads (needed, available) bytes from the compiler's message.

  Example:
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
