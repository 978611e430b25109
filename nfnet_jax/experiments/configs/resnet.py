"""ResNets on ImageNet for 90 epochs, with or without batch normalisation.

The argument is the model, 'nf_resnet50' by default:

  python -m nfnet_jax.experiments.train --config=resnet:senet50 --workdir=DIR

Section 4 of arXiv 2102.06171 compares BN, NF and NF with AGC at batch 256 to
4096 (`--config.batch_size`); the learning rate scales with the batch. AGC is
off by default; `--config.optimizer.clipping=0.01` turns it on. With small
batches, such as 4, this is the comparison of arXiv 2101.08692. The authors
report the accuracies in figures only. `fixup_resnet50` and `skipinit_resnet50`
are earlier networks without normalisation. 90 epochs, weight decay and the
other values are those of the released configuration.
"""

from __future__ import annotations

import ml_collections

from nfnet_jax.config import base


def get_config(model: str = 'nf_resnet50') -> ml_collections.ConfigDict:
  """Return the configuration."""
  config = base.get_config()
  config.model.name = model
  config.model.stochdepth_rate = 0.1
  config.batch_size = 1024
  config.train_for = '90 epochs'
  config.compute_dtype = 'float32'
  config.ema_decay = 0.0
  config.optimizer.weight_decay = 1e-4
  config.optimizer.clipping = 0.0
  config.data.mixup = False
  config.data.cutmix = False
  config.data.randaugment_layers = 0
  return config
