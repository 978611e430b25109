"""Errors that are reported to users in one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import contextlib
import difflib


class InputError(ValueError):
  """The caller's input is wrong; one line that says what to do."""


class RunError(RuntimeError):
  """A run cannot continue; one line that says why and what to do."""


# Package -> extra of setup.py that installs it.
_EXTRAS = {
  'google': 'gcs',
  'huggingface_hub': 'hub',
  'matplotlib': 'train',
  'onnx': 'onnx',
  'onnxruntime': 'onnx',
  'orbax': 'train',
  'sklearn': 'train',
  'tensorboardX': 'train',
  'tensorflow': 'train',
  'tensorflow_datasets': 'train',
}


@contextlib.contextmanager
def naming_extras() -> Iterator[None]:
  """Convert the error of a missing package into `InputError`.

  Its message names the extra that installs the package.

  Examples:
    >>> try:
    ...   with naming_extras():
    ...     raise ModuleNotFoundError(name='orbax.checkpoint')
    ... except InputError as error:
    ...   print(error)
    orbax is not installed. Run in your clone: pip install '.[train]'.
  """
  try:
    yield
  except ModuleNotFoundError as error:
    package = (error.name or '').partition('.')[0]
    if package not in _EXTRAS:
      raise
    raise InputError(
      f'{package} is not installed. Run in your clone: '
      f"pip install '.[{_EXTRAS[package]}]'."
    ) from error


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

  Examples:
    >>> one_line(ValueError('two\n  lines'))
    'two lines'
    >>> one_line(ValueError())
    'ValueError'
  """
  return ' '.join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
  r"""Return the first line of an error's message; its type if it has none.

  For libraries that add lines of source locations or stack traces, and for
  TensorStore, which adds the whole specification of a file to the line.

  Examples:
    >>> first_line(ValueError('disk full\n[source: a.cc]'))
    'disk full'
  """
  line = str(error).partition('\n')[0].partition(' [tensorstore_spec')[0]
  return line.strip() or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Return a sentence with the known name nearest to `name`, or ''.

  Examples:
    >>> did_you_mean('digit', ['digits', 'f0'])
    " Did you mean 'digits'?"
  """
  nearest = difflib.get_close_matches(name, list(known), n=1)
  return f" Did you mean '{nearest[0]}'?" if nearest else ''
