r"""timm's light NFNets on ImageNet by the recipe of NFNets, 360 epochs.

The argument is the model, 'eca_nfnet_l0' by default:

  python -m nfnet_jax.experiments.train --config=light_nfnet:eca_nfnet_l1 \
    --workdir=DIR

This is not the recipe by which timm trained its weights. To start from these,
use `--config=finetune --config.weights=eca_nfnet_l0`.
"""

from __future__ import annotations

import ml_collections

from nfnet_jax.config import base
from nfnet_jax.models import light_nfnet


def get_config(model: str = 'eca_nfnet_l0') -> ml_collections.ConfigDict:
  """Return the configuration."""
  if model not in light_nfnet.VARIANTS:
    raise ValueError(
      f"'{model}' is not a light NFNet; use one of: "
      + ', '.join(light_nfnet.VARIANTS)
    )
  config = base.get_config()
  config.model.name = model
  return config
