"""Each image of a batch gives several examples."""

import dataclasses

import numpy as np
import pytest

from nfnet_jax import preprocessing
from nfnet_jax.data import pipeline, preprocess, sources
from tests import imagenet
from tests.data import streams

PLAIN = preprocessing.Augmentation(crop='distorted', flip=True)
SIZE, VALUES = 8, range(24)


@pytest.fixture(scope='module')
def spec(tmp_path_factory):
  """Return a stream of 24 images of one class each, of one value each."""
  folder = tmp_path_factory.mktemp('images')
  for value in VALUES:
    (folder / f'{value:02}').mkdir()
    image = imagenet.Image.new('RGB', (20, 20), (10 * value,) * 3)
    image.save(folder / f'{value:02}' / 'image.png')
  return pipeline.TrainSpec(
    source=sources.load(str(folder)),
    split='train',
    batch_size=24,
    image_size=SIZE,
    shards=2,
    seed=3,
    augmentation=PLAIN,
  )


def batches(spec, count=2, **changes):
  augmentation = dataclasses.replace(spec.augmentation, **changes)
  spec = dataclasses.replace(spec, augmentation=augmentation)
  return streams.take(spec, count)


@pytest.mark.parametrize('multiplicity', [1, 3, 6])
def test_every_image_is_read_once_in_an_epoch_of_images(spec, multiplicity):
  """Of 24 images, a batch of 24 examples holds 24 / K, each of them K times."""
  labels = []
  for batch in batches(spec, multiplicity, multiplicity=multiplicity):
    np.testing.assert_array_equal(batch['position'], np.arange(24))
    values = batch['image'].mean((1, 2, 3)) / 10
    np.testing.assert_allclose(values, batch['label'][:, 0], atol=0.01)
    # Shards of 12 examples; the copies lie 12 / K apart.
    parts = batch['label'].reshape(2, multiplicity, -1)
    np.testing.assert_array_equal(parts, parts[:, :1].repeat(multiplicity, 1))
    labels += list(parts[:, 0].ravel())
  assert sorted(labels) == list(VALUES)


@pytest.mark.parametrize('partners', ['fresh', 'in_batch'])
def test_copies_are_mixed_with_copies_of_another_image(spec, partners):
  mixing = {'mixup': True, 'cutmix': True, 'partners': partners}
  for batch in batches(spec, 4, multiplicity=3, **mixing):
    first, second = batch['label'].T
    assert (first != second).all()
    expected = 10 * (batch['label'] * batch['weight']).sum(1)
    actual = batch['image'].mean((1, 2, 3))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=0.01)
    pairs = batch['label'].reshape(2, 3, 4, 2)
    np.testing.assert_array_equal(pairs, pairs[:, :1].repeat(3, 1))
    # Shares are drawn anew for each copy.
    shares = batch['weight'][:, 0].reshape(2, 3, 4)
    assert (shares[:, 0] != shares[:, 1]).any()
    distinct = len({int(label) for label in first})
    assert distinct == 8
    if partners == 'in_batch':
      np.testing.assert_array_equal(first[0::2], second[1::2])


def test_an_image_gets_both_kinds_of_mixing(spec):
  """The first half of a shard's examples is mixed by MixUp."""
  mixing = {'mixup': True, 'cutmix': True, 'multiplicity': 2}
  for batch in batches(spec, 3, **mixing):
    levels = [len(np.unique(image.round(1))) for image in batch['image']]
    parts = np.reshape(levels, (2, 2, 6))
    assert (parts[:, 0] == 1).all()
    assert (parts[:, 1] > 1).any()


@pytest.fixture(scope='module')
def crops(small_imagenet, spec):
  return dataclasses.replace(
    spec, source=small_imagenet, batch_size=16, image_size=32
  )


def test_copies_are_cropped_independently(crops):
  (batch,) = batches(crops, 1, multiplicity=4)
  copies = batch['image'].reshape(2, 4, 2, -1).swapaxes(1, 2).reshape(4, 4, -1)
  for images in copies:
    assert len({image.tobytes() for image in images}) == 4


def test_an_image_is_decoded_once(crops, monkeypatch):
  """Windows of the decoded image are those that are decoded alone."""
  whole = []
  monkeypatch.setattr(
    preprocess, 'decode_window', lambda *_: pytest.fail('decodes a window')
  )
  decode = preprocess.decode
  monkeypatch.setattr(
    preprocess, 'decode', lambda data: whole.append(0) or decode(data)
  )
  batches(crops, 1, multiplicity=4, mixup=True)
  assert len(whole) == 2  # Traced for an image and its partner.


@pytest.mark.slow
def test_augmentation_is_drawn_for_every_copy(crops):
  changes = {'randaugment_layers': 2, 'randaugment_magnitude': 10}
  (batch,) = batches(crops, 1, crop='whole', multiplicity=4, **changes)
  assert batch['image'].dtype == np.uint8
  copies = batch['image'].reshape(2, 4, 2, -1).swapaxes(1, 2).reshape(4, 4, -1)
  assert all(len({i.tobytes() for i in images}) > 1 for images in copies)


def test_a_bad_record_makes_all_its_copies_unusable(tmp_path):
  for name in ('a', 'b'):
    (tmp_path / name).mkdir()
    for index in range(4):
      image = imagenet.Image.new('RGB', (9, 9), (50,) * 3)
      image.save(tmp_path / name / f'{index}.png')
  (tmp_path / 'a' / '2.png').write_bytes(b'no image')
  spec = pipeline.TrainSpec(
    source=sources.load(str(tmp_path)),
    split='train',
    batch_size=16,
    image_size=SIZE,
    shards=1,
    seed=0,
    augmentation=dataclasses.replace(PLAIN, multiplicity=2),
    max_bad_records=1,
  )
  lines = []
  (batch,) = streams.take(spec, 1, log_fn=lines.append)
  (line,) = lines
  assert 'a/2.png' in line
  weights = batch['weight'].reshape(2, 8)
  np.testing.assert_array_equal(weights[0], weights[1])
  assert sorted(weights[0]) == [0] + [1] * 7
  assert (batch['image'][batch['weight'][:, 0] == 1].round() == 50).all()
