"""Preprocessing as plain values: checks, descriptions, metadata."""

import dataclasses

import pytest

from nfnet_jax import preprocessing


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'size': 0}, 'size is 0, not an integer of at least 1'),
    ({'size': 224.0}, 'size is 224.0'),
    ({'margin': -1}, 'margin is -1'),
    ({'crop': 'center'}, "crop is 'center', not one of squash, centre"),
  ],
)
def test_invalid_values(options, message):
  with pytest.raises(ValueError, match=message):
    preprocessing.EvalPreprocessing(**options)


@pytest.mark.parametrize(
  ('augmentation', 'text'),
  [
    (preprocessing.Augmentation(), 'whole crop'),
    (preprocessing.Augmentation(shift=3), 'whole crop, shift 3 px'),
    (
      preprocessing.Augmentation(
        crop='distorted', flip=True, cutmix=True, partners='in_batch'
      ),
      'distorted crop, flip, CutMix (in_batch)',
    ),
    (
      preprocessing.Augmentation(
        crop='distorted',
        mixup=True,
        cutmix=True,
        randaugment_layers=4,
        randaugment_magnitude=5,
      ),
      'distorted crop, MixUp and CutMix (fresh), RandAugment 4 x 5',
    ),
    (
      preprocessing.Augmentation(
        jpeg_scaling=True, augment='autoaugment', multiplicity=4
      ),
      'whole crop, JPEG scaling, AutoAugment, each image 4 times',
    ),
  ],
)
def test_description(augmentation, text):
  assert augmentation.describe() == text


@pytest.mark.parametrize(
  'kind', [preprocessing.EvalPreprocessing, preprocessing.Augmentation]
)
def test_every_field_is_documented_and_has_its_valid_values(kind):
  for field in dataclasses.fields(kind):
    assert field.metadata['description'].endswith('.')
    assert f'    {field.name}: ' in kind.__doc__
    if isinstance(field.default, str):
      assert field.default in field.metadata['choices']
    elif not isinstance(field.default, bool):
      assert field.metadata['interval']
