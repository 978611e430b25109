"""What saves that did not end leave, each up to the size of a whole state."""

from __future__ import annotations

import json
import re
import time

from etils import epath

from nfnet_jax.storage import files

# Orbax's names for such checkpoints on a disk.
_NAME_ON_DISK = re.compile(r'\d+\.orbax-checkpoint-tmp.*')
# No save takes as long.
LONG_AGO_S = 3600.0


def remove(directory: epath.Path) -> None:
  """Remove unfinished checkpoints; in a bucket, only those of long ago.

  Args:
    directory: a folder of checkpoints that no process writes now.

  Raises:
    OSError: if it cannot be read, or a checkpoint not removed.
  """
  in_bucket = files.is_in_bucket(directory)
  for path in directory.iterdir():
    if (
      path.name.isdigit() and _has_failed_in_bucket(path)
      if in_bucket
      else _NAME_ON_DISK.fullmatch(path.name)
    ):
      path.rmtree()


def _has_failed_in_bucket(path: epath.Path) -> bool:
  """Return whether a save began long ago, and did not end.

  In a bucket these have the names of complete checkpoints. They lack the file
  that Orbax writes last, but so may a complete one that was copied from a disk.
  """
  metadata = path / '_CHECKPOINT_METADATA'
  if (path / 'commit_success.txt').exists() or not metadata.exists():
    return False
  try:
    times = json.loads(metadata.read_text())
    began, ended = (
      times['init_timestamp_nsecs'],
      times['commit_timestamp_nsecs'],
    )
  except (KeyError, TypeError, ValueError):
    return False
  return ended is None and time.time() - began / 1e9 > LONG_AGO_S
