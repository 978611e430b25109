"""AutoAugment: the published policy, with the operations of RandAugment.

`test_augment.py` compares these operations with NumPy and Pillow.
"""

import numpy as np
from PIL import Image, ImageOps
import pytest
import tensorflow as tf

from nfnet_jax.data import augment, autoaugment
from tests.data import test_augment

# As printed in arXiv 1805.09501, table 9, in the variant v0: operation,
# probability in tenths, magnitude.
POLICY = """
Equalize 8 1 ShearY 8 4
Color 4 9 Equalize 6 3
Color 4 1 Rotate 6 8
Solarize 8 3 Equalize 4 7
Solarize 4 2 Solarize 6 2
Color 2 0 Equalize 8 8
Equalize 4 8 SolarizeAdd 8 3
ShearX 2 9 Rotate 6 8
Color 6 1 Equalize 10 2
Invert 4 9 Rotate 6 0
Equalize 10 9 ShearY 6 3
Color 4 7 Equalize 6 0
Posterize 4 6 AutoContrast 4 7
Solarize 6 8 Color 6 9
Solarize 2 4 Rotate 8 9
Rotate 10 7 TranslateY 8 9
ShearX 0 0 Solarize 8 4
ShearY 8 0 Color 6 4
Color 10 0 Rotate 6 2
Equalize 8 4 Equalize 0 8
Equalize 10 4 AutoContrast 6 2
ShearY 4 7 SolarizeAdd 6 7
Posterize 8 2 Solarize 6 10
Solarize 6 8 Equalize 6 1
Color 8 6 Rotate 4 5
"""


def image_of(size=48):
  return test_augment.photo(size)


@pytest.fixture(scope='module')
def layer():
  return autoaugment.AutoAugment(48)


def test_policy_is_the_published_one():
  words = POLICY.split()
  steps = [
    (name, int(tenths) / 10, int(magnitude))
    for name, tenths, magnitude in zip(*(words[i::3] for i in range(3)))
  ]
  ours = [tuple(step) for policy in autoaugment.POLICIES for step in policy]
  assert ours == steps
  assert len(autoaugment.POLICIES) == 25


def test_steps_are_applied_by_their_probability(layer):
  """In Pillow, for a sub-policy that Pillow has exactly."""
  policy = (('Equalize', 0.8, 1), ('AutoContrast', 0.4, 7))
  policy = [autoaugment.Step(*step) for step in policy]
  image = image_of()
  original = Image.fromarray(image)
  equalized = ImageOps.equalize(original)
  expected = {
    (0.79, 0.39): ImageOps.autocontrast(equalized),
    (0.79, 0.4): equalized,
    (0.8, 0.39): ImageOps.autocontrast(original),
    (0.8, 0.4): original,
  }
  for draws, picture in expected.items():
    steps = tf.constant([[draw, 0.2, 0.5, 0.5] for draw in draws])
    ours = layer.apply(policy, tf.constant(image), steps).numpy()
    assert np.abs(ours.astype(int) - np.asarray(picture)).max() <= 1


@pytest.mark.parametrize(('draw', 'sign'), [(0.2, -1), (0.7, 1)])
def test_translation_is_25_pixels_per_unit(layer, draw, sign):
  policy = [autoaugment.Step('TranslateY', 1.0, 9)]
  size = 300  # Larger than 9 x 25 pixels.
  large = autoaugment.AutoAugment(size)
  image = test_augment.noise(size)
  steps = tf.constant([[0.0, draw, 0.5, 0.5]])
  moved = large.apply(policy, tf.constant(image), steps).numpy()
  shift = 9 * 25
  expected = np.full_like(image, 128)
  if sign > 0:
    expected[:-shift] = image[shift:]
  else:
    expected[shift:] = image[:-shift]
  np.testing.assert_array_equal(moved, expected)


def test_a_seed_chooses_a_policy_and_its_draws(layer):
  image = tf.constant(image_of())
  chosen = set()
  for index in range(60):
    seed = tf.constant([7, index])
    draws = tf.random.stateless_uniform([9], seed).numpy()
    policy = autoaugment.POLICIES[int(draws[0] * 25)]
    chosen.add(policy)
    expected = image
    for step, draw in zip(policy, draws[1:].reshape(2, 4)):
      if draw[0] < step.probability:
        operations = augment.Operations(48, step.magnitude, 25)
        expected = operations.apply(step.name, expected, tf.constant(draw[1:]))
    np.testing.assert_array_equal(layer(image, seed), expected)
  assert len(chosen) > 15
