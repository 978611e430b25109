"""NFNet-F1 on ImageNet by the published recipe, 360 epochs at batch 4096.

The authors report 84.7 % top-1 (arXiv 2102.06171, table 3, mean of three
seeds); their latency on 128 TPUv3 cores makes 112,602 steps 5.0 hours.

  python -m nfnet_jax.experiments.train --config=f1 --workdir=DIR
"""

import ml_collections

from nfnet_jax.experiments.configs import f0


def get_config() -> ml_collections.ConfigDict:
  """Returns the configuration."""
  config = f0.get_config()
  config.model.name = 'nfnet_f1'
  return config
