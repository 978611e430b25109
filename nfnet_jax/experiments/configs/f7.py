"""NFNet-F7 on ImageNet by the published recipe, 360 epochs at batch 4096.

The authors report no figure for F7 on ImageNet alone; nor a latency.

  python -m nfnet_jax.experiments.train --config=f7 --workdir=DIR
"""

import ml_collections

from nfnet_jax.experiments.configs import f0


def get_config() -> ml_collections.ConfigDict:
  """Returns the configuration."""
  config = f0.get_config()
  config.model.name = 'nfnet_f7'
  return config
