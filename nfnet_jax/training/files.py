"""Files that appear complete or not at all, and scalars in them."""

from collections.abc import Iterator, Mapping
import contextlib
import json
import math
import os
import pathlib

from etils import epath


@contextlib.contextmanager
def atomically(path: str | os.PathLike) -> Iterator[epath.Path]:
  """Gives a temporary name for a file, which is renamed once it is written.

  Example:
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + '/greeting.txt'
    >>> with atomically(path) as temporary:
    ...   _ = temporary.write_text('hello')
    >>> epath.Path(path).read_text()
    'hello'
  """
  path = epath.Path(path)
  temporary = path.with_name(f'{path.name}.tmp')
  try:
    yield temporary
    temporary.replace(path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def write_atomically(path: str | os.PathLike, text: str) -> None:
  """Writes a text file under a temporary name, then renames it."""
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
