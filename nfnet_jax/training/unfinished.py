"""Removal of checkpoints whose saving did not finish.

Each may be as large as a whole state.
"""

from __future__ import annotations

import json
import re
import time

from etils import epath

from nfnet_jax.storage import files

# Orbax's names for such checkpoints on a disk.
_NAME_ON_DISK = re.compile(r'\d+\.orbax-checkpoint-tmp.*')
# No save takes this long.
LONG_AGO_S = 3600.0


def remove(directory: epath.Path) -> None:
  """Remove unfinished checkpoints; in a bucket, those that are known to be so.

  On a disk their names show it. In a bucket they are named like complete ones.
  They lack the file that Orbax writes last, but so may a complete checkpoint
  that was copied from a disk. So one is removed only if its metadata show that
  the save began long ago and did not finish. Others stay until the same step is
  saved again.

  Args:
    directory: a folder of checkpoints that no process writes now.

  Raises:
    OSError: if it cannot be read, or a checkpoint not removed. Errors of a
      bucket are of other kinds.
  """
  in_bucket = files.is_in_bucket(directory)
  for path in directory.iterdir():
    if not in_bucket and _NAME_ON_DISK.fullmatch(path.name):
      path.rmtree()
    elif in_bucket and path.name.isdigit() and _is_unfinished(path):
      # The metadata go last, so that the next call goes on if this one fails.
      for part in path.iterdir():
        if part.is_dir():
          part.rmtree()
      path.rmtree()


def _is_unfinished(path: epath.Path) -> bool:
  """Return whether a save into a bucket began long ago, and did not finish."""
  metadata = path / '_CHECKPOINT_METADATA'
  if (path / 'commit_success.txt').exists() or not metadata.exists():
    return False
  try:
    times = json.loads(metadata.read_text())
    seconds = time.time() - times['init_timestamp_nsecs'] / 1e9
    return times['commit_timestamp_nsecs'] is None and seconds > LONG_AGO_S
  except (KeyError, TypeError, ValueError):
    return False
