"""Files that appear complete or not at all, and scalars in them."""

from collections.abc import Mapping
import json
import math
import os
import pathlib


def write_atomically(path: str | os.PathLike, text: str) -> None:
  """Writes a text file under a temporary name, then renames it."""
  path = pathlib.Path(path)
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(text)
  temporary.replace(path)


def to_json(scalars: Mapping[str, float]) -> str:
  """Formats scalars as one line; JSON has no NaN, so null stands for it."""
  return json.dumps(
    {
      name: value if math.isfinite(value) else None
      for name, value in scalars.items()
    }
  )
