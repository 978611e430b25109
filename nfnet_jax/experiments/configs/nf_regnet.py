"""NF-RegNets on ImageNet by the recipe of their release, 360 epochs.

Takes the variant as argument, 'b0' by default, 'b0' to 'b5':

  python -m nfnet_jax.experiments.train --config=nf_regnet:b3 --workdir=DIR

The learning rate is 0.4 at batch 1024 and does not follow the batch. No
accuracy of theirs is known here from a source to cite.
"""

import ml_collections

from nfnet_jax.experiments.configs import f0

# The released configuration's; it grows with the variant.
_WEIGHT_DECAY = {
  'b0': 5e-5,
  'b1': 6e-5,
  'b2': 7e-5,
  'b3': 8e-5,
  'b4': 9e-5,
  'b5': 1e-4,
}


def get_config(variant: str = 'b0') -> ml_collections.ConfigDict:
  """Returns the configuration."""
  if variant not in _WEIGHT_DECAY:
    raise ValueError(
      f"'{variant}' is no variant; give one of: {', '.join(_WEIGHT_DECAY)}"
    )
  config = f0.get_config()
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
