"""NF-RegNets on ImageNet by the recipe of their release, 360 epochs.

The argument is the variant, 'b0' to 'b8'; 'b0' by default:

  python -m nfnet_jax.experiments.train --config=nf_regnet:b3 --workdir=DIR

The learning rate is 0.4 at batch 1024 and does not scale with the batch. We
know no source that reports their accuracy.
"""

from __future__ import annotations

import ml_collections

from nfnet_jax.config import base

# To b5 of the released configuration. It has none for b6 to b8; here they
# continue the series.
_WEIGHT_DECAY = {
  'b0': 5e-5,
  'b1': 6e-5,
  'b2': 7e-5,
  'b3': 8e-5,
  'b4': 9e-5,
  'b5': 1e-4,
  'b6': 1.1e-4,
  'b7': 1.2e-4,
  'b8': 1.3e-4,
}


def get_config(variant: str = 'b0') -> ml_collections.ConfigDict:
  """Return the configuration."""
  if variant not in _WEIGHT_DECAY:
    raise ValueError(
      f"'{variant}' is not a variant; use one of: {', '.join(_WEIGHT_DECAY)}"
    )
  config = base.get_config()
  config.model.name = f'nf_regnet_{variant}'
  config.model.stochdepth_rate = 0.1
  config.batch_size = 1024
  config.compute_dtype = 'float32'
  config.optimizer.learning_rate = 0.4
  config.optimizer.final_learning_rate = 0.001
  config.optimizer.weight_decay = _WEIGHT_DECAY[variant]
  config.optimizer.clipping = 0.0
  config.data.randaugment_layers = 0
  return config
