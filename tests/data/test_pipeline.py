"""Batches are a function of the seed and the step only."""

import dataclasses
import itertools

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from nfnet_jax import preprocessing
from nfnet_jax.data import pipeline, preprocess, sources
from nfnet_jax.models.fast import stem
from tests.data.streams import assert_same, take

SIZE = 53


class Numbered(tfds.core.GeneratorBasedBuilder):
  """Images of a prime number of examples, whose red channel is their index."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(None, None, 3)),
          'label': tfds.features.ClassLabel(num_classes=7),
        }
      )
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for index in range(SIZE):
      image = np.full((6, 9, 3), (index, 100, 200), np.uint8)
      yield index, {'image': image, 'label': index % 7}


@pytest.fixture(scope='module')
def numbered(data_dir):
  builder = tfds.builder('numbered', data_dir=data_dir)
  config = tfds.download.DownloadConfig(num_shards=3)
  builder.download_and_prepare(download_config=config)
  return sources.load('numbered', data_dir)


@pytest.fixture(scope='module')
def spec(numbered):
  return pipeline.TrainSpec(
    source=numbered,
    split='train',
    batch_size=8,
    image_size=8,
    shards=4,
    seed=3,
    augmentation=preprocessing.Augmentation(shift=2, flip=True),
  )


def indices(batches):
  return np.concatenate([b['image'][:, 4, 4, 0] for b in batches]).astype(int)


def test_contents_of_a_batch(spec):
  (batch,) = take(spec, 1)
  assert batch['image'].shape == (8, 8, 8, 3)
  assert batch['image'].dtype == np.float32
  assert batch['label'].dtype == batch['position'].dtype == np.int32
  np.testing.assert_array_equal(batch['position'], np.arange(8))
  np.testing.assert_array_equal(batch['label'][:, 0], indices([batch]) % 7)
  np.testing.assert_array_equal(batch['weight'], np.ones((8, 1)))
  assert batch['step'] == 0


def test_every_epoch_of_a_shard_holds_each_of_its_examples_once(spec):
  parts = spec.source.shards('train', spec.shards)
  sizes = [sources.total_examples(part) for part in parts]
  assert sizes == [14, 13, 13, 13]
  batches = take(spec, 14 * 3)
  seen = []
  for shard, size in enumerate(sizes):
    stream = indices(
      [
        {'image': batch['image'][2 * shard : 2 * shard + 2]}
        for batch in batches
      ]
    )
    epochs = [stream[e * size : (e + 1) * size] for e in range(3)]
    assert all(len(set(epoch)) == size for epoch in epochs)
    assert set(epochs[0]) == set(epochs[1])
    assert not np.array_equal(epochs[0], epochs[1])
    seen += list(epochs[0])
  assert sorted(seen) == list(range(SIZE))


def test_blocks_hold_the_same_images(spec):
  spec = dataclasses.replace(spec, shards=1)
  whole = take(spec, 3)
  blocks = take(dataclasses.replace(spec, block=4), 3)
  assert blocks[0]['image'].shape == (8, 2, 2, 48)
  for batch in whole:
    batch['image'] = np.asarray(stem.to_blocks(batch['image']))
  assert_same(blocks, whole)


@pytest.mark.parametrize(
  'start',
  [7, 13, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 6, 40))],
)
def test_resumed_stream_continues_bit_for_bit(spec, start):
  assert_same(take(spec, 4, start), take(spec, start + 4)[start:])


@pytest.mark.parametrize(
  'processes', [2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_any_number_of_processes_makes_the_same_batches(spec, processes):
  parts = [take(spec, 20, 2, p, processes) for p in range(processes)]
  for step, whole in enumerate(take(spec, 20, 2)):
    for name in ('image', 'label', 'position'):
      joined = np.concatenate([part[step][name] for part in parts])
      np.testing.assert_array_equal(joined, whole[name], err_msg=name)


@pytest.mark.slow
def test_stream_with_a_small_shuffle_buffer_resumes_bit_for_bit(spec):
  small = dataclasses.replace(spec, shuffle_buffer=12)
  assert_same(take(small, 3, 21), take(small, 24)[21:])
  assert not np.array_equal(indices(take(small, 5)), indices(take(spec, 5)))


def test_seed_changes_order_and_augmentation(spec):
  other = dataclasses.replace(spec, seed=4)
  assert not np.array_equal(indices(take(spec, 3)), indices(take(other, 3)))


def test_the_same_seed_gives_the_same_batches(spec):
  assert_same(take(spec, 10), take(spec, 10))


@pytest.mark.slow
def test_a_global_seed_changes_nothing(spec):
  batches = take(spec, 4)
  try:
    for seed in (0, 1):
      tf.random.set_seed(seed)
      assert_same(take(spec, 4), batches)
  finally:
    tf.random.set_seed(None)


def test_augmentation_differs_between_epochs_and_positions(digits):
  spec = pipeline.TrainSpec(
    digits, 'train[:4]', 4, 32, 1, 0, preprocessing.Augmentation(shift=4)
  )
  images = np.concatenate([batch['image'] for batch in take(spec, 8)])
  assert len({image.tobytes() for image in images}) > 24


@pytest.mark.parametrize(
  ('split', 'size', 'processes'),
  [
    ('train', SIZE, 1),
    ('train', SIZE, 2),
    ('train', SIZE, 4),
    ('train[:1]', 1, 2),  # The second process has no example.
  ],
)
def test_evaluation_sees_every_example_once(numbered, split, size, processes):
  streams = [
    list(
      pipeline.eval_batches(
        numbered,
        split,
        batch_size=8,
        preprocessing=preprocessing.EvalPreprocessing(8, margin=0),
        process_index=index,
        process_count=processes,
      )
    )
    for index in range(processes)
  ]
  assert len({len(stream) for stream in streams}) == 1
  real = [
    {**batch, 'image': batch['image'][batch['mask'] > 0]}
    for stream in streams
    for batch in stream
  ]
  assert len(indices(real)) == len({*indices(real)}) == size
  assert all(b['mask'].shape == (8 // processes,) for b in real)


def test_digits_are_split_by_class_without_overlap(digits):
  assert digits.num_examples('train') == 1442
  assert digits.num_examples('test') == 355
  assert digits.num_classes == 10
  labels = np.concatenate(
    [
      batch['label'][batch['mask'] > 0]
      for batch in pipeline.eval_batches(
        digits,
        'test',
        batch_size=64,
        preprocessing=preprocessing.EvalPreprocessing(8, margin=0),
      )
    ]
  )
  counts = np.bincount(labels)
  assert counts.min() >= 34
  assert counts.max() <= 36


def test_shift_moves_the_whole_image():
  image = np.zeros((9, 9, 3), np.float32)
  image[4, 4] = 1
  places = {
    tuple(
      np.argwhere(np.asarray(preprocess.random_shift(image, 2, (0, s))))[0][:2]
    )
    for s in range(200)
  }
  assert places == set(itertools.product(range(2, 7), repeat=2))
