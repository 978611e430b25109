"""ResNets on ImageNet for 90 epochs: batch-normalised, or free of it.

Takes the model as argument, 'nf_resnet50' by default:

  python -m nfnet_jax.experiments.train --config=resnet:senet50 --workdir=DIR

Section 4 of arXiv 2102.06171 compares BN, NF and NF with AGC at batch 256 to
4096 (`--config.batch_size`), the learning rate following the batch; AGC is
`--config.optimizer.clipping=0.01`, off by default. With batch 4 and the like it
is the comparison of small batches of arXiv 2101.08692. The authors report their
accuracies in figures only; 90 epochs, weight decay and the rest are those of
the released configuration.
"""

import ml_collections

from nfnet_jax.experiments.configs import f0


def get_config(model: str = 'nf_resnet50') -> ml_collections.ConfigDict:
  """Returns the configuration."""
  config = f0.get_config()
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
