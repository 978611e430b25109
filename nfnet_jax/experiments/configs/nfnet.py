"""NFNets on ImageNet by the published recipe, 360 epochs at batch 4096.

  python -m nfnet_jax.experiments.train --config=f3 --workdir=DIR

Accuracies are those that the authors report (arXiv 2102.06171, table 3): means
of three seeds, or of one run with SAM. Hours are 112,602 steps at the step time
that they report for 128 TPU v3 cores, without evaluation and input.

With SAM, the ascent takes 20 % of each device's examples, as the authors'
(appendix A.4). They do not give its radius for ImageNet; 0.05 is what they use
for fine-tuning after pre-training on a larger dataset (appendix A.5).

`f5_sam_multiplicity` augments each image 16 times in a batch, in as many steps
(Fort et al., arXiv 2105.13343), and so sees 22.5 epochs of images. Images are
mixed within the batch, which then has 256 of them. How the authors mix is not
known to us.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_collections

from nfnet_jax.config import base

_STEPS = 112_602


class Row(NamedTuple):
  """One configuration.

  Attributes:
    model: its registry name.
    top1: ImageNet top-1 in percent as reported, or None.
    step_ms: milliseconds per step on 128 TPU v3 cores as reported, or None.
    sam_rho: radius of SAM; 0 for none.
    multiplicity: examples per batch that each image gives.
  """

  model: str
  top1: float | None = None
  step_ms: float | None = None
  sam_rho: float = 0.0
  multiplicity: int = 1

  def describe(self) -> str:
    """Return one line with accuracy and time."""
    name = self.model.removeprefix('nfnet_').replace('_plus', '+').upper()
    sam = ' with SAM' if self.sam_rho else ''
    if self.multiplicity > 1:
      sam += f' and each image {self.multiplicity} times'
    facts = [
      f'{self.top1} % top-1 reported' if self.top1 else 'no reported top-1',
      f'{_STEPS * self.step_ms / 3.6e6:.1f} h on 128 TPU v3 cores'
      if self.step_ms
      else '',
    ]
    return f'NFNet-{name}{sam}: {", ".join(filter(None, facts))}'


ROWS = {
  'f0': Row('nfnet_f0', 83.6, 73.3),
  'f1': Row('nfnet_f1', 84.7, 158.5),
  'f2': Row('nfnet_f2', 85.1, 295.8),
  'f3': Row('nfnet_f3', 85.7, 532.2),
  'f4': Row('nfnet_f4', 85.9, 1033.3),
  'f5': Row('nfnet_f5', 86.0, 1398.5),
  'f5_sam': Row('nfnet_f5', 86.3, 1958.0, sam_rho=0.05),
  'f5_sam_multiplicity': Row('nfnet_f5', 86.78, sam_rho=0.05, multiplicity=16),
  'f6': Row('nfnet_f6'),
  'f6_sam': Row('nfnet_f6', 86.5, 2774.1, sam_rho=0.05),
  'f7': Row('nfnet_f7'),
  **{f'f{index}_plus': Row(f'nfnet_f{index}_plus') for index in range(8)},
}
CONFIGS = {name: row.describe() for name, row in ROWS.items()}


def get_config(name: str = 'f0') -> ml_collections.ConfigDict:
  """Return the configuration of a row."""
  row = ROWS[name]
  config = base.get_config()
  config.model.name = row.model
  config.optimizer.sam_rho = row.sam_rho
  if row.multiplicity > 1:
    config.data.multiplicity = row.multiplicity
    config.data.partners = 'in_batch'
  return config
