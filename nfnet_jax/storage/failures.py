"""Failures of storage: temporary ones, and those that are bad input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import errno
import time
from typing import TypeVar

from absl import logging

from nfnet_jax import errors

_T = TypeVar('_T')
# Seconds between two tries to read from storage that does not answer.
DELAYS_S = (1, 4, 16)

# Errors that do not go away on a retry: their types, their numbers, and the
# names of the corresponding types of TensorFlow's and Google's libraries.
_PERMANENT = (
  FileExistsError,
  FileNotFoundError,
  IsADirectoryError,
  NotADirectoryError,
  PermissionError,
)
_PERMANENT_NUMBERS = {
  errno.EINVAL,
  errno.ELOOP,
  errno.ENAMETOOLONG,
  errno.EROFS,
}
_PERMANENT_NAMES = {
  'DefaultCredentialsError',
  'Forbidden',
  'ImportError',
  'NotFound',
  'NotFoundError',
  'PermissionDeniedError',
  'Unauthorized',
  'UnauthenticatedError',
}
# How TensorStore's messages of temporary failures begin.
_OUTAGES = (
  'ABORTED:',
  'DEADLINE_EXCEEDED:',
  'RESOURCE_EXHAUSTED:',
  'UNAVAILABLE:',
)


def is_outage(error: BaseException) -> bool:
  """Return whether an error is a failure of storage that may be temporary.

  A full disk or an overloaded bucket is an outage. A missing file, bucket,
  permission or package is not, and neither are invalid contents of a file.

  Examples:
    >>> is_outage(OSError(errno.ENOSPC, 'No space left on device'))
    True
    >>> is_outage(FileNotFoundError()) or is_outage(ValueError('no JSON'))
    False
  """
  if not isinstance(error, OSError):
    return str(error).startswith(_OUTAGES)
  if isinstance(error, _PERMANENT) or error.errno in _PERMANENT_NUMBERS:
    return False
  names = {kind.__name__ for kind in type(error.__cause__).__mro__}
  return not names & _PERMANENT_NAMES


def is_denied(error: BaseException) -> bool:
  """Return whether an error is that of a file that may not be read.

  Examples:
    >>> is_denied(PermissionError()), is_denied(FileNotFoundError())
    (True, False)
  """
  # TensorStore's errors are ValueErrors.
  is_file_error = isinstance(error, PermissionError)
  return is_file_error or str(error).startswith('PERMISSION_DENIED:')


def retry(function: Callable[[], _T]) -> _T:
  """Return what a function returns; after an outage, wait and try again.

  Raises:
    Exception: the function's last error, or the first that is not an outage.

  Examples:
    >>> retry(lambda: 3)
    3
  """
  for delay in DELAYS_S:
    try:
      return function()
    except Exception as error:  # TensorStore's errors are ValueErrors.
      if not is_outage(error):
        raise
      reason = errors.first_line(error).removesuffix('.')
      logging.warning('%s. Trying again in %d s.', reason, delay)
      time.sleep(delay)
  return function()


def read(
  action: str,
  function: Callable[[], _T],
  kind: type[Exception] = Exception,
) -> _T:
  """Return what a function reads; see `retry` and `as_os_error`."""

  def attempt() -> _T:
    with as_os_error(action, kind):
      return function()

  return retry(attempt)


@contextlib.contextmanager
def as_os_error(
  action: str, kind: type[Exception] = Exception
) -> Iterator[None]:
  """Raise errors of a bucket as `OSError`, with a message of one line.

  The errors of TensorFlow and google-cloud-storage are not OSErrors, and their
  messages have many lines.

  Args:
    action: what the body does, such as 'Reading PATH', for the message.
    kind: the errors to convert.
  """
  try:
    yield
  except OSError:
    raise
  except kind as error:
    reason = errors.one_line(error)
    raise OSError(f'{action} failed ({reason.removesuffix(".")})') from error


@contextlib.contextmanager
def as_command_error(kind: type[Exception] = OSError) -> Iterator[None]:
  """Raise errors of a kind as one of the errors that a command reports.

  A command may be run again after an outage, but not after bad input.

  Args:
    kind: the errors to convert.

  Raises:
    RunError: for an outage, or an error whose cause is one; see `is_outage`.
    InputError: for any other error of this kind.
  """
  try:
    yield
  except kind as error:
    origin = error if isinstance(error, OSError) else error.__cause__
    is_temporary = isinstance(origin, OSError) and is_outage(origin)
    raise (errors.RunError if is_temporary else errors.InputError)(
      str(error)
    ) from error
