"""Errors that are reported to users in one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import contextlib
import difflib


class InputError(ValueError):
  """The caller's input is wrong; one line that says what to do."""


class RunError(RuntimeError):
  """A run cannot continue; one line that says why and what to do."""


@contextlib.contextmanager
def as_input_error(
  kind: type[Exception] | tuple[type[Exception], ...] = ValueError,
) -> Iterator[None]:
  """Convert errors of some kind inside the context into `InputError`."""
  try:
    yield
  except kind as error:
    raise InputError(str(error)) from error


def one_line(error: BaseException) -> str:
  r"""Return the whole message of an error in one line; its type if it has none.

  Example:
    >>> one_line(ValueError('two\n  lines'))
    'two lines'
    >>> one_line(ValueError())
    'ValueError'
  """
  return ' '.join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
  r"""Return the first line of an error's message; its type if it has none.

  For libraries that add lines of source locations or stack traces.

  Example:
    >>> first_line(ValueError('disk full\n[source: a.cc]'))
    'disk full'
  """
  return str(error).partition('\n')[0].strip() or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Return a sentence with the known name nearest to `name`, or ''.

  Example:
    >>> did_you_mean('digit', ['digits', 'f0'])
    " Did you mean 'digits'?"
  """
  nearest = difflib.get_close_matches(name, list(known), n=1)
  return f" Did you mean '{nearest[0]}'?" if nearest else ''
