"""Files that appear complete or not at all, and scalars in them."""

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
  """Whether a path leads into a bucket, not to a disk."""
  return '://' in os.fspath(path)


@contextlib.contextmanager
def atomically(path: str | os.PathLike) -> Iterator[epath.Path]:
  """Gives a temporary name for a file, which takes its own once it is written.

  Example:
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + '/greeting.txt'
    >>> with atomically(path) as temporary:
    ...   _ = temporary.write_text('hello')
    >>> epath.Path(path).read_text()
    'hello'
  """
  path = epath.Path(path)
  if is_in_bucket(path):
    # An object appears once all of it is there, but renaming one is to copy and
    # delete it. TensorFlow would also upload what was written before an error.
    with tempfile.TemporaryDirectory() as folder:
      temporary = epath.Path(folder) / path.name
      yield temporary
      upload(temporary, path)
    return
  temporary = path.with_name(f'{path.name}.tmp')
  try:
    yield temporary
    temporary.replace(path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def upload(local: epath.Path, path: epath.Path) -> None:
  """Copies a local file into a bucket, in place of what is there.

  Raises:
    OSError: if that fails, after TensorFlow's own repeated attempts.
  """
  with failures.as_os_error(f'Writing {path}'):
    local.copy(path, overwrite=True)


def write_atomically(path: str | os.PathLike, text: str) -> None:
  """Writes a text file that appears with all of its text."""
  with atomically(path) as temporary:
    temporary.write_text(text)


def to_json(scalars: Mapping[str, float]) -> str:
  """Formats scalars as one line; JSON has no NaN, so null stands for it."""
  return json.dumps(
    {
      name: value if math.isfinite(value) else None
      for name, value in scalars.items()
    }
  )


def cache_folder(name: str) -> pathlib.Path:
  """Returns where something is kept that can be made again; safe to delete."""
  home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(home).expanduser() / 'nfnet_jax' / name
