"""The published recipe on a small ImageNet: batches depend only on the step."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from nfnet_jax import preprocessing
from nfnet_jax.data import pipeline, records, sources
from nfnet_jax.models.fast import stem
from tests import imagenet
from tests.data.streams import assert_same, take

RECIPE = preprocessing.Augmentation(
  crop='distorted',
  flip=True,
  mixup=True,
  cutmix=True,
  randaugment_layers=4,
  randaugment_magnitude=5,
)
IN_BATCH = dataclasses.replace(RECIPE, partners='in_batch')
# Without RandAugment, whose tracing would take most of the time.
MIXED = dataclasses.replace(RECIPE, randaugment_layers=0)
MIXED_IN_BATCH = dataclasses.replace(IN_BATCH, randaugment_layers=0)
COPIES = dataclasses.replace(MIXED, multiplicity=2)
COPIES_IN_BATCH = dataclasses.replace(MIXED_IN_BATCH, multiplicity=2)


@pytest.fixture(scope='module')
def spec(small_imagenet):
  return pipeline.TrainSpec(
    source=small_imagenet,
    split='train',
    batch_size=16,
    image_size=64,
    shards=4,
    seed=5,
    augmentation=RECIPE,
  )


def test_tfds_builds_it_and_repairs_odd_images(small_imagenet):
  assert small_imagenet.num_classes == 1000
  (part,) = small_imagenet.shards('train', 1)
  seen = {}
  for _, record in records.in_order(small_imagenet, part):
    encoded, label = small_imagenet.parse(record)
    image = tf.io.decode_jpeg(encoded)
    seen[small_imagenet.key(record.numpy())] = int(label), image.shape[-1]
  names = small_imagenet.class_names
  for name, (label, _) in seen.items():
    assert name.startswith(names[label])
  assert seen[imagenet.CMYK][1] == seen[imagenet.PNG][1] == 3
  assert [channels for _, channels in seen.values()].count(1) == 4  # Grey.


@pytest.mark.parametrize(
  'augmentation', [RECIPE, pytest.param(IN_BATCH, marks=pytest.mark.slow)]
)
def test_contents_of_a_batch(spec, augmentation):
  spec = dataclasses.replace(spec, augmentation=augmentation)
  batches = take(spec, 6)
  for step, batch in enumerate(batches):
    assert batch['image'].shape == (16, 64, 64, 3)
    assert batch['image'].dtype == np.uint8
    assert batch['label'].shape == batch['weight'].shape == (16, 2)
    assert batch['label'].dtype == batch['position'].dtype == np.int32
    assert batch['weight'].dtype == np.float32
    np.testing.assert_allclose(batch['weight'].sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(batch['position'], np.arange(16))
    assert batch['step'] == step
  assert len({image.tobytes() for b in batches for image in b['image']}) > 90


@pytest.mark.slow
@pytest.mark.parametrize('augmentation', [RECIPE, IN_BATCH])
def test_blocks_hold_the_same_images(spec, augmentation):
  spec = dataclasses.replace(spec, augmentation=augmentation)
  whole = take(spec, 1)
  blocks = take(dataclasses.replace(spec, block=4), 1)
  assert blocks[0]['image'].dtype == np.uint8
  whole[0]['image'] = np.asarray(stem.to_blocks(whole[0]['image']))
  assert_same(blocks, whole)


@pytest.mark.parametrize(
  ('augmentation', 'starts'),
  [
    pytest.param(RECIPE, [2], marks=pytest.mark.slow),
    (MIXED, [3]),
    pytest.param(MIXED, [1, 7], marks=pytest.mark.slow),
    pytest.param(MIXED_IN_BATCH, [5, 6], marks=pytest.mark.slow),
    pytest.param(COPIES, [5, 7], marks=pytest.mark.slow),
    (COPIES_IN_BATCH, [4]),
  ],
)
def test_resumed_stream_continues_bit_for_bit(spec, augmentation, starts):
  spec = dataclasses.replace(spec, augmentation=augmentation)
  whole = take(spec, 10)
  for start in starts:
    assert_same(take(spec, 3, start), whole[start : start + 3])


@pytest.mark.slow
@pytest.mark.parametrize(
  ('augmentation', 'processes'),
  [
    (RECIPE, 2),
    (MIXED, 4),
    (MIXED_IN_BATCH, 2),
    (COPIES, 4),
    (COPIES_IN_BATCH, 2),
  ],
)
def test_any_number_of_processes_makes_the_same_batches(
  spec, augmentation, processes
):
  spec = dataclasses.replace(spec, augmentation=augmentation)
  parts = [take(spec, 6, 2, p, processes) for p in range(processes)]
  for step, whole in enumerate(take(spec, 6, 2)):
    for name in ('image', 'label', 'weight', 'position'):
      joined = np.concatenate([part[step][name] for part in parts])
      np.testing.assert_array_equal(joined, whole[name], err_msg=name)


@pytest.mark.slow
def test_parallelism_changes_nothing(spec, monkeypatch):
  parallel = take(spec, 8)
  for calls in (1, 7):
    monkeypatch.setattr(pipeline, 'CALLS', calls)
    assert_same(take(spec, 8), parallel)


def test_fresh_partners_read_two_images_for_each_example(spec):
  plain = dataclasses.replace(
    spec,
    augmentation=preprocessing.Augmentation(crop='distorted', mixup=True),
    shards=1,
  )
  batches = take(plain, 3)  # 96 images in 48 examples.
  labels = np.concatenate([batch['label'] for batch in batches])
  counts = np.bincount(labels.ravel(), minlength=1000)
  assert sorted(counts[counts > 0]) == [24] * 4


def test_partners_in_batch_are_neighbours_in_both_orders(spec):
  spec = dataclasses.replace(spec, augmentation=MIXED_IN_BATCH)
  epoch = np.concatenate([batch['label'] for batch in take(spec, 6)])
  np.testing.assert_array_equal(epoch[0::2], epoch[1::2, ::-1])
  counts = np.bincount(epoch[:, 0])
  assert sorted(counts[counts > 0]) == [24] * 4


def constant_images(folder):
  """Write two classes of constant images: 100 and 200 in all channels."""
  for value in (100, 200):
    (folder / str(value)).mkdir()
    image = imagenet.Image.new('RGB', (30, 30), (value,) * 3)
    for index in range(16):
      image.save(folder / str(value) / f'{index}.png')
  return sources.load(str(folder))


def test_mixed_images_are_what_their_labels_say(tmp_path):
  spec = pipeline.TrainSpec(
    source=constant_images(tmp_path),
    split='train',
    batch_size=16,
    image_size=16,
    shards=2,
    seed=0,
    augmentation=preprocessing.Augmentation(
      crop='distorted', mixup=True, cutmix=True
    ),
  )
  for batch in take(spec, 8):
    values = np.array([100.0, 200.0])[batch['label']]
    expected = (values * batch['weight']).sum(1)
    # The mean pixel follows the labels' weights for MixUp and CutMix alike.
    np.testing.assert_allclose(
      batch['image'].mean((1, 2, 3)), expected, rtol=1e-5
    )
    for position, (image, pair) in enumerate(zip(batch['image'], values)):
      levels = np.unique(image.round(2))
      if position % 8 < 4:
        assert len(levels) == 1, 'MixUp'
      else:
        assert set(levels) <= set(pair), 'CutMix'


@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_one_kind_of_mixing_applies_to_the_whole_batch(tmp_path, kind):
  spec = pipeline.TrainSpec(
    source=constant_images(tmp_path),
    split='train',
    batch_size=8,
    image_size=16,
    shards=1,
    seed=0,
    augmentation=preprocessing.Augmentation(**{kind: True}),
  )
  (batch,) = take(spec, 1)
  levels = [len(np.unique(image.round(2))) for image in batch['image']]
  mixed = batch['label'][:, 0] != batch['label'][:, 1]
  cut = (batch['weight'].min(1) > 0) & mixed
  assert mixed.any()
  assert [count > 1 for count in levels] == list(cut & (kind == 'cutmix'))


def test_without_randaugment_values_leave_0_to_255(small_imagenet, spec):
  crops = dataclasses.replace(
    spec, augmentation=preprocessing.Augmentation(crop='distorted', flip=True)
  )
  images = np.concatenate([batch['image'] for batch in take(crops, 4)])
  assert images.dtype == np.float32
  assert images.min() < 0
  assert images.max() > 255


@pytest.mark.parametrize(
  'crop', ['squash', pytest.param('centre', marks=pytest.mark.slow)]
)
def test_evaluation_sees_every_image_once(small_imagenet, crop):
  for processes in (1, 3):
    batches = [
      batch
      for index in range(processes)
      for batch in pipeline.eval_batches(
        small_imagenet,
        'validation',
        batch_size=9,
        preprocessing=preprocessing.EvalPreprocessing(24, crop, margin=8),
        process_index=index,
        process_count=processes,
      )
    ]
    images = np.concatenate([b['image'][b['mask'] > 0] for b in batches])
    assert images.shape == (37, 24, 24, 3)
    assert images.dtype == np.float32
    assert len({image.tobytes() for image in images}) == 37


@pytest.mark.slow
def test_many_shards_stay_within_the_limit_of_open_files(small_imagenet, spec):
  many = dataclasses.replace(spec, shards=16, batch_size=32)
  assert len(take(many, 2)) == 2
