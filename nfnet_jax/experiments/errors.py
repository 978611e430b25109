"""What doors tell a person about bad input."""

from collections.abc import Iterator
import contextlib

from nfnet_jax.training import files


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


@contextlib.contextmanager
def of_storage() -> Iterator[None]:
  """Tells an outage, after which a command may be tried again, from bad input.

  Raises:
    RunError: for an `OSError` of storage that may pass; see `files.is_outage`.
    InputError: for any other `OSError`.
  """
  try:
    yield
  except OSError as error:
    kind = RunError if files.is_outage(error) else InputError
    raise kind(str(error)) from error
