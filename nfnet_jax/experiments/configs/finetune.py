r"""Fine-tuning of a trained network on another dataset, 15,000 steps of 2048.

  python -m nfnet_jax.experiments.train --config=finetune --workdir=DIR \
    --config.weights=F0 --config.dataset=cifar10

The model is the one of the weights. The classifier is initialised again if, and
only if, the number of classes differs. Image sizes are those of the model; the
paper also fine-tunes at others, for example with `--config.data.image_size=384
--config.data.eval_size=384`.

This is the recipe of table 4 of arXiv 2102.06171 (appendix A.5): learning rate
0.1 for every batch size, 5,000 steps of warm-up, no weight decay, dropout or
stochastic depth, EMA with decay 0.9999. `--config=finetune:sam` is the recipe
of NFNet-F4 and F4+ in table 5: SAM with radius 0.05, weight decay 1e-5, dropout
0.25 and stochastic depth 0.1; the paper reports similar results without them.
`--config=finetune:scaling` is that of Smith et al., "ConvNets match vision
transformers at scale" (arXiv 2310.16764), for networks of
`--config=pretrain:scaling`: 50 epochs with SAM at 384 pixels, evaluated at 480;
`--config.data.multiplicity=4` raises its 90.3 % top-1 to 90.4. What the
paper says of other values is not known to us; here they are those of
`finetune:sam`, with 5 epochs of warm-up.
`--config=finetune:small` is for hundreds to thousands of images, and not from
the paper. Batch, length, EMA and evaluation split follow from the dataset, see
`config/small_data.py`.

The paper does not specify: augmentation (here crops and flips), clipping (here
0.01; for networks that were trained without clipping, use
`--config.optimizer.clipping=0`), label smoothing (here 0.1), and, for F4, the
image size and the decay of the EMA.
"""

from __future__ import annotations

import ml_collections
from ml_collections import config_dict

from nfnet_jax.config import base

_RECIPES = ('plain', 'sam', 'scaling', 'small')


def get_config(recipe: str = 'plain') -> ml_collections.ConfigDict:
  """Return the configuration."""
  if recipe not in _RECIPES:
    raise ValueError(
      f"'{recipe}' is not a recipe; use one of: {', '.join(_RECIPES)}"
    )
  config = base.get_config()
  config.dataset = config_dict.placeholder(str)
  config.model.name = config_dict.placeholder(str)
  config.batch_size = 2048
  config.train_for = '15000 steps'
  config.ema_decay = 0.9999
  config.model.stochdepth_rate = 0.0
  config.model.dropout_rate = 0.0
  config.optimizer.learning_rate = 0.1
  config.optimizer.warmup = '5000 steps'
  config.optimizer.weight_decay = 0.0
  config.data.mixup = False
  config.data.cutmix = False
  config.data.randaugment_layers = 0
  config.run.eval_every = '1000 steps'
  config.run.checkpoint_every = '500 steps'
  if recipe in ('sam', 'scaling'):
    config.model.stochdepth_rate = 0.1
    config.model.dropout_rate = 0.25
    config.optimizer.weight_decay = 1e-5
    config.optimizer.sam_rho = 0.05
  if recipe == 'scaling':
    config.train_for = '50 epochs'
    config.optimizer.warmup = '5 epochs'
    config.data.image_size = 384
    config.data.eval_size = 480
  elif recipe == 'small':
    config.batch_size = config_dict.placeholder(int)
    config.train_for = config_dict.placeholder(str)
    config.ema_decay = config_dict.placeholder(float)
    config.optimizer.learning_rate = config_dict.placeholder(float)
    config.optimizer.base_rate = 0.4
    config.optimizer.warmup = '1 epoch'
    config.data.eval_split = config_dict.placeholder(str)
    config.data.shards = 8
    config.run.log_every = '50 steps'
    config.run.eval_every = '1 epoch'
    config.run.checkpoint_every = '1 epoch'
  return config
