"""NFNet-F0 on ImageNet by the published recipe, 360 epochs at batch 4096.

The authors report 83.6 % top-1 (arXiv 2102.06171, table 3, mean of three
seeds); their latency on 128 TPUv3 cores makes 112,602 steps 2.3 hours.

  python -m nfnet_jax.experiments.train --config=f0 --workdir=DIR
"""

import ml_collections

from nfnet_jax.config import base as config_lib


def get_config() -> ml_collections.ConfigDict:
  """Returns the configuration."""
  return config_lib.base()
