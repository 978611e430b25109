"""NFNet-F2+ on ImageNet by the published recipe, 360 epochs at batch 4096.

Wider than F2, with its sizes, dropout and RandAugment. The authors report no
figure for it on ImageNet alone, nor a latency.

  python -m nfnet_jax.experiments.train --config=f2_plus --workdir=DIR
"""

import ml_collections

from nfnet_jax.experiments.configs import f0


def get_config() -> ml_collections.ConfigDict:
  """Returns the configuration."""
  config = f0.get_config()
  config.model.name = 'nfnet_f2_plus'
  return config
