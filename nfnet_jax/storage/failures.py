"""Failures of storage: which may pass, and which are bad input."""

from collections.abc import Iterator
import contextlib
import errno

from nfnet_jax import errors

# What a disk refuses however often it is asked, and names of what TensorFlow's
# and Google's libraries raise then.
_LASTING = (
  FileExistsError,
  FileNotFoundError,
  IsADirectoryError,
  NotADirectoryError,
  PermissionError,
)
_LASTING_NUMBERS = {errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS}
_LASTING_NAMES = {
  'DefaultCredentialsError',
  'Forbidden',
  'ImportError',
  'NotFound',
  'NotFoundError',
  'PermissionDeniedError',
  'Unauthorized',
  'UnauthenticatedError',
}
# As TensorStore begins its messages.
_OUTAGES = (
  'ABORTED:',
  'DEADLINE_EXCEEDED:',
  'RESOURCE_EXHAUSTED:',
  'UNAVAILABLE:',
)


def is_outage(error: BaseException) -> bool:
  """Whether it is storage that failed, in a way that may pass.

  A full disk or a bucket that is too busy is an outage; a missing file, bucket,
  permission or package is not, nor is what was read but makes no sense.

  Example:
    >>> is_outage(OSError(errno.ENOSPC, 'No space left on device'))
    True
    >>> is_outage(FileNotFoundError()) or is_outage(ValueError('no JSON'))
    False
  """
  if not isinstance(error, OSError):
    return str(error).startswith(_OUTAGES)
  if isinstance(error, _LASTING) or error.errno in _LASTING_NUMBERS:
    return False
  names = {kind.__name__ for kind in type(error.__cause__).__mro__}
  return not names & _LASTING_NAMES


@contextlib.contextmanager
def as_os_error(doing: str) -> Iterator[None]:
  """Raises what a bucket's file system raises as a disk's would be.

  TensorFlow and google-cloud-storage have errors of their own, which are no
  OSErrors and have many lines.

  Args:
    doing: what was tried, for the message.
  """
  try:
    yield
  except OSError:
    raise
  except Exception as error:
    reason = errors.one_line(error)
    raise OSError(f'{doing} failed ({reason.removesuffix(".")})') from error


@contextlib.contextmanager
def as_command_error() -> Iterator[None]:
  """Tells an outage, after which a command may be tried again, from bad input.

  Raises:
    RunError: for an `OSError` of storage that may pass; see `is_outage`.
    InputError: for any other `OSError`.
  """
  try:
    yield
  except OSError as error:
    kind = errors.RunError if is_outage(error) else errors.InputError
    raise kind(str(error)) from error
