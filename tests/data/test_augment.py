"""RandAugment against NumPy and Pillow versions of its description."""

import functools
import math
from unittest import mock

import numpy as np
from PIL import Image, ImageOps
import pytest
from scipy import stats
import tensorflow as tf

from nfnet_jax.data import augment

OPERATIONS = (
  *('AutoContrast', 'Equalize', 'Invert', 'Posterize', 'Solarize'),
  *('SolarizeAdd', 'Color', 'Contrast', 'Brightness', 'Sharpness', 'Cutout'),
  *('Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY'),
)
BLENDS = ('Color', 'Contrast', 'Brightness', 'Sharpness')
GEOMETRIC = OPERATIONS[-5:]
SIZES = (8, 32, 45)
MAGNITUDES = (
  10,
  *(pytest.param(each, marks=pytest.mark.slow) for each in (3, 5, 15, 30)),
)
# The sign, and Cutout's centre (y, x).
DRAWS = ((0.01, 0.5, 0.5), (0.49, 0, 0.7), (0.51, 0.999, 0.3), (0.99, 0.2, 0))
GREY = 128


def noise(size, low=0, high=256):
  rng = np.random.default_rng(size)
  return rng.integers(low, high, (size, size, 3), np.uint8)


def photo(size):
  """Smooth shapes with sensor noise and a different range in each channel."""
  y, x = np.mgrid[:size, :size] / size
  waves = [np.sin(5 * x + 3 * y + c) + np.cos(9 * y - 4 * x) for c in range(3)]
  grain = np.random.default_rng(0).normal(0, 4, (size, size, 3))
  image = np.stack(waves, axis=-1) * (60, 45, 30) + (128, 100, 160) + grain
  return np.clip(image, 0, 255).astype(np.uint8)


def images(size):
  """Return [kind, size, size, 3]."""
  flat = [np.full((size, size, 3), value, np.uint8) for value in (0, 77, 255)]
  two_valued = [
    np.where(noise(size, 0, 2) > 0, *pair).astype(np.uint8)
    for pair in ((255, 0), (128, 127), (77, 76))
  ]
  flat_channel = noise(size)
  flat_channel[..., 1] = 200
  narrow = noise(size, 100, 112)
  return np.stack(
    [noise(size), photo(size), flat_channel, narrow, *flat, *two_valued]
  )


@functools.cache
def results(size, magnitude):
  """Run all operations as a graph: [kind, draw, operation, size, size, 3]."""
  apply = augment.Operations(size, magnitude).apply
  every = tf.function(
    lambda image, draw: tf.stack(
      [apply(name, image, draw) for name in OPERATIONS]
    )
  )
  draws = tf.constant(DRAWS)
  return np.stack(
    [[every(image, draw) for draw in draws] for image in images(size)]
  )


def result(name, size, magnitude):
  """Return [kind, draw, size, size, 3] of one operation."""
  return results(size, magnitude)[:, :, OPERATIONS.index(name)]


def apply(name, image, magnitude, draw=DRAWS[0]):
  layer = augment.Operations(len(image), magnitude)
  return layer.apply(name, tf.constant(image), tf.constant(draw)).numpy()


def by_pillow(function, *args):
  return lambda image, _: np.asarray(function(Image.fromarray(image), *args))


def blend(a, b, magnitude):
  """Interpolate from a to b in float32, and truncate."""
  factor = np.float32(magnitude * 0.18 + 0.1)
  a, b = np.float32(a), np.float32(b)
  return np.clip(a + factor * (b - a), 0, 255).astype(np.uint8)


def auto_contrast(image, _):
  low, high = np.float32(image.min(axis=(0, 1))), image.max(axis=(0, 1))
  scale = np.float32(255) / np.where(high > low, high - low, 255)
  stretched = np.clip(image * scale - low * scale, 0, 255).astype(np.uint8)
  return np.where(high > low, stretched, image)


def posterize(image, magnitude):
  bits = int(0.4 * magnitude)
  return image if bits >= 8 else image >> (8 - bits) << (8 - bits)


def solarize(image, magnitude):
  threshold = int(25.6 * magnitude) % 256
  return np.where(image < threshold, image, 255 - image)


def solarize_add(image, magnitude):
  brighter = np.clip(image.astype(int) + 11 * magnitude, 0, 255)
  return np.where(image < 128, brighter, image)


def color(image, magnitude):
  # 255.5: a conversion to [0, 1] and back is rounded, not truncated.
  luma = image.astype(float) @ (0.2989, 0.5870, 0.1140) / 255 * 255.5
  grey = np.floor(np.minimum(luma, 255) + 1e-4)
  return blend(grey[..., None], image, magnitude)


def contrast(image, magnitude):
  constant = min(image.shape[0] * image.shape[1] // 256, 255)
  return blend(np.full(image.shape, constant), image, magnitude)


def brightness(image, magnitude):
  return blend(np.zeros(image.shape), image, magnitude)


def sharpness(image, magnitude):
  size, wide = len(image), image.astype(int)
  smoothed = wide.copy()
  for y in range(1, size - 1):
    for x in range(1, size - 1):
      around = wide[y - 1 : y + 2, x - 1 : x + 2].sum(axis=(0, 1))
      smoothed[y, x] = (around + 4 * wide[y, x]) // 13
  sharp = blend(smoothed, image, magnitude)
  for border in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
    sharp[border] = image[border]
  return sharp


REFERENCES = {
  'AutoContrast': auto_contrast,
  'Equalize': by_pillow(ImageOps.equalize),
  'Invert': by_pillow(ImageOps.invert),
  'Posterize': posterize,
  'Solarize': solarize,
  'SolarizeAdd': solarize_add,
  'Contrast': contrast,
  'Brightness': brightness,
  'Sharpness': sharpness,
}


def test_there_are_sixteen_operations():
  assert sorted(augment.OPERATIONS) == sorted(OPERATIONS)
  assert len(OPERATIONS) == 16


@pytest.mark.parametrize('magnitude', MAGNITUDES)
@pytest.mark.parametrize('name', REFERENCES)
def test_operation_equals_its_definition(name, magnitude):
  for size in SIZES:
    ours = result(name, size, magnitude)
    for image, by_draw in zip(images(size), ours):
      expected = REFERENCES[name](image, magnitude)
      for each in by_draw:  # Nothing is drawn.
        np.testing.assert_array_equal(each, expected)


def test_auto_contrast_is_close_to_that_of_pillow():
  """Pillow computes in double precision; some values truncate differently."""
  for size in SIZES:
    ours = result('AutoContrast', size, 10)
    for image, by_draw in zip(images(size), ours):
      expected = by_pillow(ImageOps.autocontrast)(image, 10)
      difference = by_draw.astype(int) - expected
      assert np.abs(difference).max() <= 1
      assert (difference != 0).mean() < 0.05


@pytest.mark.parametrize('magnitude', MAGNITUDES)
def test_color_blends_with_the_luma(magnitude):
  """Sums in another order rarely truncate differently."""
  for size in SIZES:
    expected = np.stack([color(image, magnitude) for image in images(size)])
    ours = result('Color', size, magnitude).astype(int)
    difference = np.abs(ours - expected[:, None])
    assert difference.max() <= 1 + 0.18 * magnitude
    assert (difference != 0).mean() < 0.001


def transform(name, size, magnitude, sign):
  """Return the source (x, y) of each pixel of the output."""
  y, x = np.mgrid[:size, :size].astype(float)
  shear, shift = sign * 0.03 * magnitude, sign * 10 * magnitude
  angle = sign * math.radians(3 * magnitude)
  cos, sin, middle = math.cos(angle), math.sin(angle), (size - 1) / 2
  from_x, from_y = x - middle, y - middle
  return {
    'Rotate': (
      cos * from_x - sin * from_y + middle,
      sin * from_x + cos * from_y + middle,
    ),
    'ShearX': (x + shear * y, y),
    'ShearY': (x, y + shear * x),
    'TranslateX': (x + shift, y),
    'TranslateY': (x, y + shift),
  }[name]


def nearest(image, x, y):
  size = len(image)
  x, y = np.round(x).astype(int), np.round(y).astype(int)
  outside = (x < 0) | (x >= size) | (y < 0) | (y >= size)
  moved = image[np.clip(y, 0, size - 1), np.clip(x, 0, size - 1)]
  return np.where(outside[..., None], GREY, moved)


def is_moved(ours, image, name, magnitude, sign):
  """Compare; half-way between pixels either neighbour is valid."""
  x, y = transform(name, len(image), magnitude, sign)
  nudges = [(a, b) for a in (-1e-3, 1e-3) for b in (-1e-3, 1e-3)]
  choices = np.stack([nearest(image, x + a, y + b) for a, b in nudges])
  unsure = (choices != choices[0]).any(axis=(0, 3))
  assert unsure.mean() <= max(1 / 8, 2 / len(image))
  return (choices == ours).all(axis=-1).any(axis=0).all()


@pytest.mark.parametrize('magnitude', MAGNITUDES)
@pytest.mark.parametrize('name', GEOMETRIC)
def test_pixels_move_in_both_directions(name, magnitude):
  for size in SIZES:
    ours = result(name, size, magnitude)
    for image, by_draw in zip(images(size), ours):
      low, also_low, high, also_high = by_draw
      np.testing.assert_array_equal(low, also_low)
      np.testing.assert_array_equal(high, also_high)
      assert is_moved(low, image, name, magnitude, -1)
      assert is_moved(high, image, name, magnitude, 1)


def test_quarter_turns_lose_no_pixel():
  for size in SIZES:
    image, by_draw = noise(size), result('Rotate', size, 30)[0]
    np.testing.assert_array_equal(by_draw[0], np.rot90(image, -1))
    np.testing.assert_array_equal(by_draw[2], np.rot90(image))


@pytest.mark.parametrize('name', ['TranslateX', 'TranslateY'])
def test_translation_beyond_the_image_leaves_grey(name):
  for size, magnitude in ((8, 3), (45, 5), (45, 30), (50, 5)):
    image = np.zeros((size, size, 3), np.uint8)
    for draw in DRAWS:
      moved = apply(name, image, magnitude, draw)
      np.testing.assert_array_equal(moved, np.full_like(image, GREY))
  image = np.zeros((51, 51, 3), np.uint8)
  assert (apply(name, image, 5) == 0).sum() == 51 * 3


@pytest.mark.parametrize('size', [45, 96])
@pytest.mark.parametrize('magnitude', [3, 5, 10])
def test_cutout_fills_a_square_cut_at_the_border(size, magnitude):
  image = photo(size)
  half = 4 * magnitude
  y, x = np.mgrid[:size, :size]
  for _, *centre in (*DRAWS, (0, 0, 0), (0, 0.9999, 0.9999)):
    middle_y, middle_x = (int(np.float32(c) * size) for c in centre)
    hole = (y >= middle_y - half) & (y < middle_y + half)
    hole &= (x >= middle_x - half) & (x < middle_x + half)
    expected = np.where(hole[..., None], GREY, image)
    for sign in (0, 0.9):
      ours = apply('Cutout', image, magnitude, (sign, *centre))
      np.testing.assert_array_equal(ours, expected)


def test_area_of_cutout():
  black = np.zeros((96, 96, 3), np.uint8)
  filled = lambda *centre: (apply('Cutout', black, 5, (0, *centre)) > 0).sum()
  assert filled(0.5, 0.5) == 40 * 40 * 3
  assert filled(0, 0) == 20 * 20 * 3
  assert filled(0, 0.5) == 20 * 40 * 3


@pytest.mark.parametrize('name', BLENDS)
def test_blends_do_nothing_at_magnitude_5(name):
  for size in SIZES:
    ours = result(name, size, 5)
    for draw in range(len(DRAWS)):
      np.testing.assert_array_equal(ours[:, draw], images(size))
  assert np.any(result(name, 32, 10) != result(name, 32, 5))


@pytest.mark.parametrize(('magnitude', 'bits'), [(5, 2), (10, 4), (15, 6)])
def test_posterize_is_strongest_at_small_magnitudes(magnitude, bits):
  ours = result('Posterize', 45, magnitude)[0, 0]
  assert len(np.unique(ours)) == 2**bits
  expected = by_pillow(ImageOps.posterize, bits)(noise(45), None)
  np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
  ('magnitude', 'threshold'), [(5, 128), (10, 0), (15, 128)]
)
def test_threshold_of_solarize_wraps(magnitude, threshold):
  ours = result('Solarize', 45, magnitude)[0, 0]
  expected = by_pillow(ImageOps.solarize, threshold)(noise(45), None)
  np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
  ('size', 'constant'), [(192, 144), (224, 196), (256, 255), (320, 255)]
)
def test_contrast_blends_with_the_number_of_pixels_over_256(size, constant):
  black = np.zeros((size, size, 3), np.uint8)
  factor = 3 * 0.18 + 0.1
  expected = np.full_like(black, int(constant * (1 - factor)))
  np.testing.assert_array_equal(apply('Contrast', black, 3), expected)
  flat = np.full_like(black, min(constant, 255))
  np.testing.assert_array_equal(apply('Contrast', flat, 15), flat)


def test_sharpness_keeps_the_border():
  image = noise(32)
  sharp = apply('Sharpness', image, 10)
  same = (sharp == image).all(axis=-1)
  assert same[[0, -1]].all()
  assert same[:, [0, -1]].all()
  assert same[1:-1, 1:-1].mean() < 0.1


class Recorder(augment.Operations):
  """Writes the operation and its draws, in 1/256, into the top rows."""

  def __init__(self, size, *args):
    self.size = size
    super().__init__(size, *args)

  def apply(self, name, image, draw):
    operation = tf.constant([augment.OPERATIONS.index(name), 0, 0], tf.uint8)
    top = tf.stack([operation, tf.cast(draw * 256, tf.uint8)])
    return tf.concat([tf.tile(top, [self.size // 2, 1])[None], image[:-1]], 0)


def record(layers, seeds, size=4):
  """Return operations `[seeds, layers]` and draws `[seeds, layers, 3]`."""
  with mock.patch.object(augment, 'Operations', Recorder):
    recorder = augment.RandAugment(size, layers, 10)
  blank = tf.zeros((size, size, 3), tf.uint8)
  dataset = tf.data.Dataset.from_tensor_slices(tf.constant(seeds))
  dataset = dataset.map(lambda seed: recorder(blank, seed))
  recorded = np.stack(list(dataset.as_numpy_iterator()))
  recorded = recorded[:, :layers][:, ::-1]  # The last layer is on top.
  return recorded[:, :, 0, 0], recorded[:, :, 1]


@pytest.fixture(scope='module')
def recorded():
  return record(4, [[5, i] for i in range(3000)])


def assert_uniform(values, bins):
  counts = np.bincount(np.ravel(values), minlength=bins)
  assert len(counts) == bins
  assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.slow
def test_each_layer_draws_operations_uniformly(recorded):
  operations, _ = recorded
  for layer in operations.T:
    assert_uniform(layer, 16)
  for one in range(4):
    for other in range(one):
      assert_uniform(operations[:, one] * 16 + operations[:, other], 256)


@pytest.mark.slow
def test_signs_and_centres_are_uniform_and_independent(recorded):
  operations, draws = recorded
  sixteenths = draws.astype(int) // 16
  for layer in range(4):
    for draw in range(3):
      assert_uniform(draws[:, layer, draw] // 128, 2)
      assert_uniform(sixteenths[:, layer, draw], 16)
      assert_uniform(
        operations[:, layer] * 2 + sixteenths[:, layer, 0] // 8, 32
      )
  for one, other in ((0, 1), (0, 2), (1, 2)):
    pairs = sixteenths[:, :, one] * 16 + sixteenths[:, :, other]
    assert_uniform(pairs, 256)


@pytest.fixture(scope='module')
def layers():
  return augment.RandAugment(64, 4, 3)


SEEDS = [[3, i] for i in range(16)]


@pytest.fixture(scope='module')
def augmented(layers):
  image = tf.constant(photo(64))
  return np.stack([layers(image, tf.constant(seed)) for seed in SEEDS])


def test_layers_are_applied_in_order(augmented):
  operations, draws = record(4, SEEDS)
  apply = augment.Operations(64, 3).apply
  for index, ours in enumerate(augmented):
    image = tf.constant(photo(64))
    for layer in range(4):
      name = augment.OPERATIONS[operations[index, layer]]
      image = apply(name, image, (draws[index, layer] + 0.5) / 256)
    np.testing.assert_array_equal(ours, image)


def test_every_seed_augments_differently(augmented):
  assert len({image.tobytes() for image in augmented}) == len(SEEDS)


def test_parallel_map_equals_eager_calls(layers, augmented):
  dataset = tf.data.Dataset.from_tensor_slices(SEEDS)
  image = tf.constant(photo(64))
  dataset = dataset.map(lambda seed: layers(image, seed), num_parallel_calls=4)
  assert dataset.element_spec == tf.TensorSpec((64, 64, 3), tf.uint8)
  ours = np.stack(list(dataset.as_numpy_iterator()))
  np.testing.assert_array_equal(ours, augmented)


def test_the_same_seed_gives_the_same_images(augmented):
  other = augment.RandAugment(64, 4, 3)
  ours = [other(tf.constant(photo(64)), seed) for seed in SEEDS[:8]]
  np.testing.assert_array_equal(ours, augmented[:8])


def test_no_layers_change_nothing():
  image = noise(8)
  same = augment.RandAugment(8, 0, 10)(tf.constant(image), [0, 0])
  np.testing.assert_array_equal(same, image)
