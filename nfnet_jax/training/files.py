"""Files that appear complete or not at all."""

import os
import pathlib


def write_atomically(path: str | os.PathLike, text: str) -> None:
  """Writes a text file under a temporary name, then renames it."""
  path = pathlib.Path(path)
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(text)
  temporary.replace(path)
