"""The ablation from SE-ResNeXt-D to NFNet, one change at a time.

The argument is depth and step, 'f0_baseline' by default:

  python -m nfnet_jax.experiments.train --config=ladder:f1_mixup --workdir=DIR

The authors report, in % top-1 (arXiv 2102.06171, tables 2 and 6; each of the
first six steps includes those above it):

  step             F0    F1    F2    F3
  baseline         80.4  81.7  82.0  82.3
  modified_width   80.9  81.8  82.0  82.3
  second_conv      81.3  82.2  82.4  82.7
  mixup            82.2  82.9  83.1  83.5
  randaugment      83.2  84.6  84.8  85.0
  cutmix           83.6  84.7  85.1  85.7
  default_width    83.1  84.5  85.0  85.5
  bn               83.4  84.4  85.1  85.5
"""

from __future__ import annotations

import ml_collections

from nfnet_jax.config import base

# Step -> how the model's name ends, and which augmentations are on.
_STEPS = {
  'baseline': ('_baseline', ()),
  'modified_width': ('_modified_width', ()),
  'second_conv': ('', ()),
  'mixup': ('', ('mixup',)),
  'randaugment': ('', ('mixup', 'randaugment')),
  'cutmix': ('', ('mixup', 'randaugment', 'cutmix')),
  'default_width': ('_default_width', ('mixup', 'randaugment', 'cutmix')),
  'bn': ('_bn', ('mixup', 'randaugment', 'cutmix')),
}


def get_config(step: str = 'f0_baseline') -> ml_collections.ConfigDict:
  """Return the configuration."""
  depth, _, name = step.partition('_')
  if depth not in ('f0', 'f1', 'f2', 'f3') or name not in _STEPS:
    raise ValueError(
      f"'{step}' is not a step; join f0 to f3 with one of: "
      + ', '.join(f'_{name}' for name in _STEPS)
    )
  ending, augmentations = _STEPS[name]
  config = base.get_config()
  config.model.name = f'nfnet_{depth}{ending}'
  config.data.mixup = 'mixup' in augmentations
  config.data.cutmix = 'cutmix' in augmentations
  if 'randaugment' not in augmentations:
    config.data.randaugment_layers = 0
  if name == 'bn':
    config.optimizer.clipping = 0.0
  return config
