"""Pre-trains a network on a large dataset, to be fine-tuned.

Takes the kind of network as argument, 'nfnet' by default:

  python -m nfnet_jax.experiments.train --config=pretrain --workdir=DIR \\
    --config.dataset=DATASET

The authors' dataset, JFT-300M, is not public: name any that TFDS prepares with
images and labels. Settings are those of arXiv 2102.06171, section 6.2 and
appendix A.5: 224 pixels whatever the network, crops and flips, no average.
'nfnet' takes NFNet-F4 through 40 epochs at batch 4096 with weight decay 1e-6
(20 epochs for `--config.model.name=nfnet_f4_plus`); 'resnet' takes NF-ResNet-50
through 10 epochs at batch 1024, learning rate 0.4, 5,000 steps of warm-up and
weight decay 1e-5, and any ResNet, such as `--config.model.name=bn_resnet50`.
After fine-tuning on ImageNet the authors report 89.2 % top-1 for F4 and F4+
(table 5), and for NF-ResNet-50 at 224 pixels 79.5 %, BN-ResNet-50 78.1 % (table
4).

The paper leaves open: dropout, stochastic depth and label smoothing (here the
ImageNet recipe's), and clipping of the ResNets (here none).
"""

import ml_collections
from ml_collections import config_dict

from nfnet_jax.config import base as config_lib
from nfnet_jax.experiments.configs import resnet

_KINDS = ('nfnet', 'resnet')


def get_config(kind: str = 'nfnet') -> ml_collections.ConfigDict:
  """Returns the configuration."""
  if kind not in _KINDS:
    raise ValueError(f"'{kind}' is none of: {', '.join(_KINDS)}")
  if kind == 'nfnet':
    config = config_lib.base()
    config.model.name = 'nfnet_f4'
    config.train_for = '40 epochs'
    config.optimizer.weight_decay = 1e-6
    config.data.mixup = False
    config.data.cutmix = False
    config.data.randaugment_layers = 0
  else:
    config = resnet.get_config()
    config.train_for = '10 epochs'
    config.optimizer.learning_rate = 0.4
    config.optimizer.warmup = '5000 steps'
    config.optimizer.weight_decay = 1e-5
  config.dataset = config_dict.placeholder(str)
  config.ema_decay = 0.0
  config.data.image_size = 224
  config.data.eval_size = 224
  return config
