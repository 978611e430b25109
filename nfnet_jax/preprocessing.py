"""Preprocessing of images for evaluation and training, as plain values.

Training, evaluation, prediction, feature extraction and export share these two
classes. `data` applies them; `config` and `weights` store them. An option is
added here, as a field, and applied in `data/preprocess.py` and `images.py`
(evaluation) or in `data/examples.py` (training). Its setting in the config,
with the setting's checks and documentation, is made from the field.
"""

from __future__ import annotations

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
  """Declare a dataclass field that is also a setting.

  Args:
    default: value of the field if none is given.
    description: one line of documentation.
    interval: valid numbers, such as '[0, 1)'.
    choices: valid strings.

  Returns:
    The field, with the description, interval and choices as its metadata.
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
  """Preprocessing of an image for evaluation.

  Attributes:
    size: height and width of the network's input, in pixels.
    crop: 'squash' resizes both sides to `size + margin` without regard to the
      aspect ratio and crops the centre; 'centre' crops the central square, of
      side `size / (size + margin)` of the shorter one, and resizes it.
    margin: pixels that are cropped; 32 as published, 0 for small images.

  Raises:
    ValueError: if a value is invalid.

  Examples:
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

  def __post_init__(self) -> None:
    for name, minimum in (('size', 1), ('margin', 0)):
      value = getattr(self, name)
      if type(value) is not int or value < minimum:
        raise ValueError(
          f'{name} is {value!r}, not an integer of at least {minimum}'
        )
    for field in dataclasses.fields(self):
      value, choices = getattr(self, field.name), field.metadata['choices']
      if choices and value not in choices:
        raise ValueError(
          f'{field.name} is {value!r}, not one of {", ".join(choices)}'
        )


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Augmentation of training images, applied in the order of the fields.

  Attributes:
    crop: 'distorted' for a random window, 'whole' for the whole image.
    jpeg_scaling: whether the decoder halves a JPEG once or more while the crop
      stays at least as large as the training image. This is faster for large
      photos. Their crops become smoother than those of evaluation, which are
      resized without antialiasing.
    flip: whether images are mirrored at random.
    shift: largest random translation at the final size, in pixels.
    mixup: whether images are mixed by MixUp.
    cutmix: whether images are mixed by CutMix. With both, the first half of
      each data shard's examples is mixed by MixUp, the second by CutMix.
    partners: 'fresh' mixes each image with another one that is read only for
      this purpose, so that two are decoded per example, as published;
      'in_batch' mixes neighbours with each other and decodes one per example.
    multiplicity: examples that each image gives in a batch. They are cropped,
      mixed and augmented independently, from an image that is decoded once, and
      never mixed with each other.
    augment: 'randaugment', or 'autoaugment' for a random one of the 25
      sub-policies of AutoAugment (policy v0) in its place.
    randaugment_layers: operations of RandAugment; 0 for none.
    randaugment_magnitude: strength of RandAugment.

  Examples:
    >>> Augmentation(flip=True, mixup=True).describe()
    'whole crop, flip, MixUp (fresh)'

  Source: arXiv 2102.06171, appendix A.3; multiplicity: arXiv 2105.13343.
  """

  crop: str = option(
    'whole', 'Crop in training.', choices=('distorted', 'whole')
  )
  jpeg_scaling: bool = option(
    False, 'Decode large JPEGs at 1/2, 1/4 or 1/8 of their size.'
  )
  flip: bool = option(False, 'Mirror training images at random.')
  shift: int = option(0, 'Largest random translation, px.', interval='[0, inf)')
  mixup: bool = option(False, 'Mix images by MixUp.')
  cutmix: bool = option(False, 'Mix images by CutMix.')
  partners: str = option(
    'fresh', 'What images are mixed with.', choices=('fresh', 'in_batch')
  )
  multiplicity: int = option(
    1, 'Examples per batch that each image gives.', interval='[1, inf)'
  )
  augment: str = option(
    'randaugment',
    'Operations on mixed images; AutoAugment has no further settings.',
    choices=('randaugment', 'autoaugment'),
  )
  randaugment_layers: int = option(
    0, 'Operations of RandAugment per image.', interval='[0, inf)'
  )
  randaugment_magnitude: int = option(
    0, 'Magnitude of RandAugment.', interval='[0, 30]'
  )

  @property
  def makes_uint8(self) -> bool:
    """Whether operations follow that make uint8 pixels."""
    return self.augment == 'autoaugment' or bool(self.randaugment_layers)

  @property
  def mixes(self) -> bool:
    """Whether images are mixed."""
    return self.mixup or self.cutmix

  @property
  def records_per_group(self) -> int:
    """Number of records from which a group of examples is made."""
    return 2 if self.mixes else 1

  @property
  def examples_per_group(self) -> int:
    """Number of examples made from a group of records."""
    return self.multiplicity * self.examples_per_copy

  @property
  def examples_per_copy(self) -> int:
    """Number of examples made at once from a group's images."""
    return 2 if self.mixes and self.partners == 'in_batch' else 1

  def describe(self) -> str:
    """Return the augmentation in words, for the summary of a run."""
    layers, magnitude = self.randaugment_layers, self.randaugment_magnitude
    mixing = ' and '.join(
      name
      for name, is_used in (('MixUp', self.mixup), ('CutMix', self.cutmix))
      if is_used
    )
    operations = f'RandAugment {layers} x {magnitude}' if layers else ''
    if self.augment == 'autoaugment':
      operations = 'AutoAugment'
    parts = [
      f'{self.crop} crop' + (', JPEG scaling' if self.jpeg_scaling else ''),
      'flip' if self.flip else '',
      f'shift {self.shift} px' if self.shift else '',
      f'{mixing} ({self.partners})' if mixing else '',
      operations,
      f'each image {self.multiplicity} times' if self.multiplicity > 1 else '',
    ]
    return ', '.join(filter(None, parts))
