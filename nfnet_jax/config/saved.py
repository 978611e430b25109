"""The configuration of a run, as a config file: `--config=saved.py:WORKDIR`.

This way, overrides apply to the configuration of a run as they do to any other.
"""

from __future__ import annotations

import ml_collections

from nfnet_jax.config import base
from nfnet_jax.config import workdir as workdir_lib


def get_config(*workdir: str) -> ml_collections.ConfigDict:
  """Return the configuration of a run.

  Args:
    *workdir: its path, split at colons, as arguments of config files are.

  Returns:
    The configuration, or that of `base` if this process cannot see the workdir:
    with several processes, only process 0 needs to.
  """
  path = ':'.join(workdir)
  if not workdir_lib.is_run(path):
    return base.get_config()
  return workdir_lib.load(path)
