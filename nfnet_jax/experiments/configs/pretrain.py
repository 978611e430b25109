r"""Pre-training on a large dataset, for fine-tuning afterwards.

The argument is the kind of network, 'nfnet' by default:

  python -m nfnet_jax.experiments.train --config=pretrain --workdir=DIR \
    --config.dataset=DATASET

The authors' dataset, JFT-300M, is not public. Name any dataset of images and
labels that TFDS prepares. Settings are those of arXiv 2102.06171, section 6.2
and appendix A.5: 224 pixels for every network, crops and flips, no EMA.
'nfnet' trains NFNet-F4 for 40 epochs at batch 4096 with weight decay 1e-6 (use
20 epochs for `--config.model.name=nfnet_f4_plus`). 'resnet' trains
NF-ResNet-50, or another ResNet such as `--config.model.name=bn_resnet50`, for
10 epochs at batch 1024 with learning rate 0.4, 5,000 steps of warm-up and
weight decay 1e-5. 'scaling' trains NFNet-F7+ for 8 epochs with evaluation at
256 pixels, as Smith et al., "ConvNets match vision transformers at scale"
(arXiv 2310.16764), did on JFT-4B. They also train F0, F1, F3, F3+ and F7
(`--config.model.name`) for 0.25 to 8 epochs. Their best learning rates, on a
grid of factors of 2, are about 1.6 for short runs of small networks, and fall
slowly with size and length; 1.6 is the default here for all networks, and
`--config.optimizer.learning_rate=0.8` the next one of the grid. The memory that
F7+ needs was not planned. They report 90.3 % top-1 on ImageNet after
`--config=finetune:scaling`.

After fine-tuning on ImageNet, the authors report 89.2 % top-1 for F4 and F4+
(table 5), and at 224 pixels 79.5 % for NF-ResNet-50 and 78.1 % for
BN-ResNet-50 (table 4).

The papers do not specify dropout, stochastic depth and label smoothing (here
those of the ImageNet recipe), clipping for the ResNets (here none), and, for
'scaling', warm-up (here 5,000 steps) and weight decay (here that of 'nfnet').
"""

from __future__ import annotations

import ml_collections
from ml_collections import config_dict

from nfnet_jax.config import base
from nfnet_jax.experiments.configs import resnet

_KINDS = ('nfnet', 'resnet', 'scaling')


def get_config(kind: str = 'nfnet') -> ml_collections.ConfigDict:
  """Return the configuration."""
  if kind not in _KINDS:
    raise ValueError(f"'{kind}' is none of: {', '.join(_KINDS)}")
  if kind == 'resnet':
    config = resnet.get_config()
    config.train_for = '10 epochs'
    config.optimizer.learning_rate = 0.4
    config.optimizer.warmup = '5000 steps'
    config.optimizer.weight_decay = 1e-5
  else:
    config = base.get_config()
    config.model.name = 'nfnet_f4'
    config.train_for = '40 epochs'
    config.optimizer.weight_decay = 1e-6
    config.data.mixup = False
    config.data.cutmix = False
    config.data.randaugment_layers = 0
  config.dataset = config_dict.placeholder(str)
  config.ema_decay = 0.0
  config.data.image_size = 224
  config.data.eval_size = 224
  if kind == 'scaling':
    config.model.name = 'nfnet_f7_plus'
    config.train_for = '8 epochs'
    config.optimizer.warmup = '5000 steps'
    config.data.eval_size = 256
  return config
