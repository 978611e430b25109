"""MixUp and CutMix: pixels, and the distributions of the draws."""

import numpy as np
import pytest
from scipy import stats
import tensorflow as tf

from nfnet_jax.data import mix

SEEDS = np.stack([np.full(6000, 7), np.arange(6000)], axis=1)


def pair(size=16):
  """Two images with values outside 0..255, as after a bicubic resize."""
  rng = np.random.default_rng(size)
  images = rng.uniform(-60, 320, (2, size, size, 3)).astype(np.float32)
  assert images.min() < 0
  assert images.max() > 255
  return images


def mixed_with(function, first, second, seeds=SEEDS):
  """Return the images and the shares for many seeds."""
  first, second = tf.constant(first), tf.constant(second)
  dataset = tf.data.Dataset.from_tensor_slices(seeds)
  dataset = dataset.map(lambda seed: function(first, second, seed))
  dataset = dataset.batch(len(seeds))
  (result,) = dataset.as_numpy_iterator()
  return result


@pytest.fixture(scope='module')
def shares():
  first, second = np.ones((2, 1, 1, 3), np.float32) * [[[[1]]], [[[0]]]]
  images, shares = mixed_with(
    mix.mixup, first.astype(np.float32), second.astype(np.float32)
  )
  np.testing.assert_array_equal(
    images, np.tile(shares, (3, 1)).T[:, None, None]
  )
  return shares


def test_mixup_averages_with_the_share_as_weight():
  first, second = pair()
  images, shares = mixed_with(mix.mixup, first, second, SEEDS[:50])
  assert images.dtype == shares.dtype == np.float32
  weight = shares.astype(float)[:, None, None, None]
  expected = weight * first + (1 - weight) * second
  np.testing.assert_allclose(images, expected, atol=1e-4)


def test_share_of_mixup_is_beta(shares):
  assert shares.min() >= 0
  assert shares.max() <= 1
  # 2 % of the distribution lie within 1e-7 of 1, where float32 has only 1.
  points = np.concatenate([np.logspace(-6, -1, 11), np.linspace(0.1, 0.9, 9)])
  points = np.concatenate([points, 1 - points])
  below = (shares[:, None] <= points).mean(axis=0)
  np.testing.assert_allclose(below, stats.beta(0.2, 0.2).cdf(points), atol=0.02)
  assert abs(shares.mean() - 1 / 2) < 0.02
  assert abs(shares.var() - 1 / 4 / 1.4) < 0.005


def test_alpha_of_mixup():
  one = np.ones((1, 1, 3), np.float32)
  uniform = lambda *args: mix.mixup(*args, alpha=1.0)
  _, shares = mixed_with(uniform, one, one)
  assert stats.kstest(shares, 'uniform').pvalue > 0.01


def simulated_boxes(size, count):
  """Draw CutMix's boxes as described: bool `[count, size, size]`."""
  rng = np.random.default_rng(0)
  side = (size * np.sqrt(1 - rng.uniform(size=count))).astype(int)
  place = np.arange(size)
  begin = rng.integers(0, size, (2, count)) - side // 2
  begin, end = begin[..., None], (begin + side)[..., None]
  inside = (place >= begin) & (place < end)
  return inside[0, :, :, None] & inside[1, :, None, :]


@pytest.fixture(scope='module')
def boxes():
  """Return where CutMix keeps the first image: bool `[6000, 24, 24]`."""
  first, second = pair(24)
  images, shares = mixed_with(mix.cutmix, first, second)
  assert images.dtype == shares.dtype == np.float32
  kept = (images == first).all(axis=-1)
  # Every pixel is exactly one of the two.
  np.testing.assert_array_equal(
    images, np.where(kept[..., None], first, second)
  )
  np.testing.assert_allclose(shares, kept.mean(axis=(1, 2)), atol=1e-7)
  return kept


def test_cutmix_keeps_a_box_of_the_first_image(boxes):
  rows, columns = boxes.any(axis=2), boxes.any(axis=1)
  filled = rows[:, :, None] & columns[:, None, :]
  np.testing.assert_array_equal(boxes, filled)
  for side in (rows, columns):  # At most one begin and one end in each.
    assert (np.abs(np.diff(side.astype(int), axis=1)).sum(axis=1) <= 2).all()


def test_box_is_a_square_unless_the_border_cuts_it(boxes):
  rows, columns = boxes.any(axis=2), boxes.any(axis=1)
  height, width = rows.sum(axis=1), columns.sum(axis=1)
  ends = np.concatenate([rows[:, [0, -1]], columns[:, [0, -1]]], axis=1)
  inside = ~ends.any(axis=1)
  assert inside.sum() > 500
  np.testing.assert_array_equal(height[inside], width[inside])
  assert (height != width).sum() > 500
  # A side is cut at one end only.
  cut = (height < width) & ~ends[:, 2:].any(axis=1)
  assert cut.sum() > 100
  assert (ends[cut, :2].sum(axis=1) == 1).all()


def test_area_of_the_box_is_distributed_as_described(boxes):
  areas = boxes.mean(axis=(1, 2))
  expected = simulated_boxes(24, 20000).mean(axis=(1, 2))
  assert stats.ks_2samp(areas, expected).pvalue > 0.01
  # E[(r - r^2/4)^2] with r = sqrt(1 - u), less what rounding down costs.
  assert 0.27 < areas.mean() < 0.3208


def test_boxes_are_spread_evenly(boxes):
  expected = simulated_boxes(24, 20000).mean(axis=0)
  np.testing.assert_allclose(boxes.mean(axis=0), expected, atol=0.025)
  small = boxes[(boxes.sum(axis=(1, 2)) <= 9) & boxes.any(axis=(1, 2))]
  centres = [np.argwhere(box).mean(axis=0) for box in small]
  quarters = np.histogram2d(*np.transpose(centres), bins=3)[0]
  assert stats.chisquare(quarters.ravel()).pvalue > 1e-3


def test_boxes_may_be_empty():
  first, second = pair(3)
  images, shares = mixed_with(mix.cutmix, first, second, SEEDS[:200])
  empty = shares == 0
  assert 5 < empty.sum() < 60  # About 1 of 9: sqrt(1 - u) < 1/3.
  np.testing.assert_array_equal(images[empty], [second] * empty.sum())


@pytest.mark.parametrize('size', [1, 2, 5])
def test_boxes_may_be_the_whole_image(size, monkeypatch):
  draws = lambda *_: tf.constant([0, 0.5, 0.5])  # The side, the centre.
  monkeypatch.setattr(tf.random, 'stateless_uniform', draws)
  first, second = pair(size)
  image, share = mix.cutmix(tf.constant(first), tf.constant(second), [0, 0])
  assert share == 1
  np.testing.assert_array_equal(image, first)


@pytest.mark.parametrize('function', [mix.mixup, mix.cutmix])
def test_results_depend_only_on_the_seed(function):
  first, second = pair()
  images, shares = mixed_with(function, first, second, SEEDS[:30])
  assert len({image.tobytes() for image in images}) >= 28
  for seed, image, share in zip(SEEDS, images, shares):
    again, again_share = function(tf.constant(first), tf.constant(second), seed)
    np.testing.assert_array_equal(again, image)
    assert again_share == share


def test_to_uint8_clips_and_truncates():
  values = [-300, -3.2, -0.5, 0, 0.999, 1, 127.5, 254.999, 255, 255.5, 300, 1e9]
  expected = [0, 0, 0, 0, 0, 1, 127, 254, 255, 255, 255, 255]
  result = mix.to_uint8(tf.constant(values, tf.float32))
  assert result.dtype == tf.uint8
  np.testing.assert_array_equal(result, expected)
