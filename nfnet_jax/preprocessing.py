"""What is done to images before a network sees them, as plain values.

Training, evaluation, prediction, feature extraction and export share these two
classes. `data` applies them; `config` and `weights` store them. Adding an
option here and applying it in `data` is all that it takes: settings of the same
name, their checks and their documentation follow from the fields.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

CROPS = ('squash', 'centre')


def option(
  default: Any,
  description: str,
  *,
  interval: str | None = None,
  choices: Sequence[str] | None = None,
) -> Any:
  """Declare a field that is also a setting.

  Args:
    default: its value if nobody sets it.
    description: one line for people.
    interval: the numbers that it may be, such as '[0, 1)'.
    choices: the strings that it may be.
  """
  return dataclasses.field(
    default=default,
    metadata={
      'description': description,
      'interval': interval,
      'choices': choices,
    },
  )


@dataclasses.dataclass(frozen=True)
class EvalPreprocessing:
  """What evaluation does to an image.

  Attributes:
    size: side of the square that the network sees, in pixels.
    crop: 'squash' resizes both sides to `size + margin` without regard to the
      aspect ratio and keeps the centre; 'centre' cuts the central square, of
      side `size / (size + margin)` of the shorter one, and resizes it.
    margin: pixels that are cut off; 32 as published, 0 for small images.

  Raises:
    ValueError: if a value is not possible.

  Example:
    >>> EvalPreprocessing(256).crop
    'squash'

  Source: arXiv 2102.06171, appendix A.1. The released code resizes without
  regard to the aspect ratio for NFNets.
  """

  size: int = option(224, 'Image size in evaluation, px.', interval='[1, inf)')
  crop: str = option('squash', 'Crop in evaluation.', choices=CROPS)
  margin: int = option(
    32, 'Pixels that evaluation cuts off.', interval='[0, inf)'
  )

  def __post_init__(self):
    for name, least in (('size', 1), ('margin', 0)):
      value = getattr(self, name)
      if type(value) is not int or value < least:
        raise ValueError(f'{name} is {value!r}, not an integer from {least} on')
    if self.crop not in CROPS:
      raise ValueError(f'crop is {self.crop!r}, none of {", ".join(CROPS)}')


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """What happens to training images, in this order.

  Attributes:
    crop: 'distorted' for a random window, 'whole' for the whole image.
    flip: whether images are mirrored at random.
    shift: pixels of random translation, at the final size.
    mixup: whether images are mixed by MixUp.
    cutmix: whether images are mixed by CutMix. With both, the first half of
      each data shard's examples is mixed by MixUp, the second by CutMix.
    partners: 'fresh' mixes each image with one that is read for this purpose,
      so that two are decoded per example, as published; 'in_batch' mixes
      neighbours with each other and decodes one per example.
    randaugment_layers: operations of RandAugment; 0 for none.
    randaugment_magnitude: strength of RandAugment.

  Source: arXiv 2102.06171, appendix A.3.
  """

  crop: str = option(
    'whole', 'Crop in training.', choices=('distorted', 'whole')
  )
  flip: bool = option(False, 'Mirror training images at random.')
  shift: int = option(0, 'Largest random translation, px.', interval='[0, inf)')
  mixup: bool = option(False, 'Mix images by MixUp.')
  cutmix: bool = option(False, 'Mix images by CutMix.')
  partners: str = option(
    'fresh', 'What images are mixed with.', choices=('fresh', 'in_batch')
  )
  randaugment_layers: int = option(
    0, 'Operations of RandAugment per image.', interval='[0, inf)'
  )
  randaugment_magnitude: int = option(
    0, 'Magnitude of RandAugment.', interval='[0, 30]'
  )

  @property
  def mixes(self) -> bool:
    """Whether images are mixed."""
    return self.mixup or self.cutmix

  @property
  def records_in(self) -> int:
    """Records that are made into examples together."""
    return 2 if self.mixes else 1

  @property
  def examples_out(self) -> int:
    """Examples that are made of them."""
    return 2 if self.mixes and self.partners == 'in_batch' else 1
