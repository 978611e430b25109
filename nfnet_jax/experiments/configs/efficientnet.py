"""EfficientNets on ImageNet, with RandAugment of two layers.

The argument is the variant, 'b0' to 'b7'; 'b0' by default:

  python -m nfnet_jax.experiments.train --config=efficientnet:b3 --workdir=DIR

Tan and Le (arXiv 1905.11946, section 5.2): RMSProp, learning rate 0.256 at
batch 4096 falling by 0.97 every 2.4 epochs, weight decay 1e-5. Retrained with
the augmentations of NFNets, they gain from RandAugment with two layers; more
layers, MixUp and CutMix do not help, and SGD with a cosine is worse (arXiv
2102.06171, section 6.1). The paper does not give the magnitude; here it is 10.
Reported there: B0 77.1, B3 81.6, B4 82.9, B5 83.7, B6 84.0 and B7 84.7 % top-1
(table 3).
"""

from __future__ import annotations

import ml_collections

from nfnet_jax.config import base


def get_config(variant: str = 'b0') -> ml_collections.ConfigDict:
  """Return the configuration."""
  config = base.get_config()
  config.model.name = f'efficientnet_{variant}'
  config.model.stochdepth_rate = 0.2
  config.train_for = '350 epochs'
  config.ema_decay = 0.9999
  config.optimizer.base_rate = 0.016
  config.optimizer.decay_every = '2.4 epochs'
  config.optimizer.nesterov = False
  config.optimizer.rms_decay = 0.9
  config.optimizer.weight_decay = 1e-5
  config.optimizer.clipping = 0.0
  config.data.mixup = False
  config.data.cutmix = False
  config.data.randaugment_layers = 2
  config.data.randaugment_magnitude = 10
  return config
