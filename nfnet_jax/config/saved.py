"""The configuration that a workdir was made with, as a config file.

Doors that work on a finished run take it where `--config` is not given, so that
single settings can be overridden.
"""

import ml_collections

from nfnet_jax.config import base as config_lib
from nfnet_jax.config import workdir as workdir_lib


def get_config(*workdir: str) -> ml_collections.ConfigDict:
  """Returns the configuration of `WORKDIR/config.json`.

  Args:
    *workdir: its path, cut at colons as config arguments are.

  Returns:
    The configuration; that of `config_lib.base` if there is none to be seen.
  """
  workdir = ':'.join(workdir)
  if not workdir_lib.is_run(workdir):
    # Of several processes the first may be the one that sees it, and tells.
    return config_lib.base()
  return workdir_lib.load(workdir)
