"""Atomic writes to local files and buckets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import json
import math
import os
import pathlib
import tempfile

from etils import epath

from nfnet_jax.storage import failures


def is_in_bucket(path: str | os.PathLike) -> bool:
  """Return whether a path is in a bucket, not on a disk."""
  return '://' in os.fspath(path)


@contextlib.contextmanager
def atomically(path: str | os.PathLike) -> Iterator[epath.Path]:
  """Yield a temporary path; rename it to `path` after the body succeeds.

  Examples:
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + '/greeting.txt'
    >>> with atomically(path) as temporary:
    ...   _ = temporary.write_text('hello')
    >>> epath.Path(path).read_text()
    'hello'
  """
  target = epath.Path(path)
  if is_in_bucket(target):
    # Write locally and upload. A bucket never shows an incomplete object, so no
    # rename is needed, which would copy the object. Writing directly is not
    # safe: after an error TensorFlow uploads what was written so far.
    with tempfile.TemporaryDirectory() as folder:
      temporary = epath.Path(folder) / target.name
      yield temporary
      upload(temporary, target)
    return
  temporary = target.with_name(f'{target.name}.tmp')
  try:
    yield temporary
    temporary.replace(target)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def check_writable(folder: str | os.PathLike) -> None:
  """Check that a local folder exists and can be written to, or can be made.

  Nothing is left there. Folders in buckets pass.

  Raises:
    OSError: naming the folder that cannot be written to.
  """
  if is_in_bucket(folder):
    return
  path = pathlib.Path(folder).absolute()
  nearest = next(each for each in (path, *path.parents) if each.exists())
  try:
    tempfile.TemporaryFile(dir=nearest).close()
  except OSError as error:
    text = f"'{folder}' cannot be written to: {nearest}: {error.strerror}"
    refused = type(error)(text)
    refused.errno = error.errno
    raise refused from error


def upload(local: epath.Path, path: epath.Path) -> None:
  """Copy a local file into a bucket and replace the object that is there.

  Raises:
    OSError: if that fails after TensorFlow's retries.
  """
  with failures.as_os_error(f'Writing {path}'):
    local.copy(path, overwrite=True)


def write_atomically(path: str | os.PathLike, text: str) -> None:
  """Write a text file that never exists with only a part of its text."""
  with atomically(path) as temporary:
    temporary.write_text(text)


def to_json(scalars: Mapping[str, float]) -> str:
  """Return scalars as one line of JSON; NaN and infinities become null."""
  return json.dumps(
    {
      name: value if math.isfinite(value) else None
      for name, value in scalars.items()
    }
  )


def cache_folder(name: str) -> pathlib.Path:
  """Return the folder of a cache; it is safe to delete at any time."""
  home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(home).expanduser() / 'nfnet_jax' / name
