"""What doors tell a person about bad input."""

from collections.abc import Iterator
import contextlib


class InputError(ValueError):
  """Something the caller gave is wrong; one line that says what to do."""


class RunError(RuntimeError):
  """A run cannot go on; one line that says why, and what to do."""


@contextlib.contextmanager
def as_input_error(
  kind: type[Exception] | tuple[type[Exception], ...] = ValueError,
) -> Iterator[None]:
  """Turns a library's complaint about an argument into an `InputError`."""
  try:
    yield
  except kind as error:
    raise InputError(str(error)) from error
