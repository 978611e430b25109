"""NFNet-F6 on ImageNet by the published recipe, 360 epochs at batch 4096.

The authors report 86.5 % top-1 with SAM (arXiv 2102.06171, table 3), which is
`f6_sam`; without it, as here, they report neither an accuracy nor a latency.

  python -m nfnet_jax.experiments.train --config=f6 --workdir=DIR
"""

import ml_collections

from nfnet_jax.experiments.configs import f0


def get_config() -> ml_collections.ConfigDict:
  """Returns the configuration."""
  config = f0.get_config()
  config.model.name = 'nfnet_f6'
  return config
