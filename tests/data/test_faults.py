"""Bad records are named, counted and skipped; good ones stay the same."""

import io
import pathlib
import time

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from nfnet_jax import preprocessing
from nfnet_jax.data import faults, pipeline, sources
from nfnet_jax.storage import failures
from tests import imagenet
from tests.data.streams import assert_same, take

GOOD = 40
RECIPE = preprocessing.Augmentation(
  crop='distorted', flip=True, mixup=True, cutmix=True
)


def store(folder, bad_images=(), bad_labels=()):
  """Store a dataset, and corrupt some records after TFDS wrote them."""
  features = tfds.features.FeaturesDict(
    {
      'image': tfds.features.Image(encoding_format='jpeg'),
      'label': tfds.features.ClassLabel(num_classes=3),
      'file_name': tfds.features.Text(),
    }
  )
  rows = [
    (
      index,
      {
        'image': io.BytesIO(imagenet.encoded(imagenet.photo(index))),
        'label': index % 3,
        'file_name': f'image_{index}.JPEG',
      },
    )
    for index in range(GOOD)
  ]
  tfds.dataset_builders.store_as_tfds_dataset(
    name='corrupt',
    version='1.0.0',
    features=features,
    split_datasets={'train': rows},
    data_dir=str(folder),
  )
  (path,) = folder.glob('corrupt/1.0.0/*.tfrecord*')
  records = []
  for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
    example = tf.train.Example.FromString(record)
    fields = example.features.feature
    index = int(fields['file_name'].bytes_list.value[0][6:-5])
    if index in bad_images:
      image = fields['image'].bytes_list.value
      image[0] = image[0][: len(image[0]) // 8]
    if index in bad_labels:
      fields['label'].int64_list.value[0] = bad_labels[index]
    records.append(example.SerializeToString())
  with tf.io.TFRecordWriter(str(path)) as writer:
    for record in records:
      writer.write(record)
  return sources.load('corrupt', str(folder)), path


@pytest.fixture(scope='module')
def good(tmp_path_factory):
  """A dataset without bad records."""
  return store(tmp_path_factory.mktemp('good'))[0]


def spec(source, max_bad_records=0, augmentation=RECIPE):
  return pipeline.TrainSpec(
    source=source,
    split='train',
    batch_size=8,
    image_size=16,
    shards=2,
    seed=1,
    augmentation=augmentation,
    max_bad_records=max_bad_records,
  )


@pytest.mark.parametrize(
  ('corruption', 'message'),
  [
    ({'bad_images': [7]}, 'image_7.JPEG, record .* cannot be decoded'),
    pytest.param(
      {'bad_labels': {9: 3}},
      r'image_9.JPEG, .* label 3 is not in \[0, 3\)',
      marks=pytest.mark.slow,
    ),
    pytest.param(
      {'bad_labels': {9: -1}},
      r'image_9.JPEG, .* label -1 is not in',
      marks=pytest.mark.slow,
    ),
  ],
)
def test_bad_record_is_named(tmp_path, corruption, message):
  source, _ = store(tmp_path, **corruption)
  where = f"dataset 'corrupt', split 'train', example {message}"
  with pytest.raises(faults.BadDataError, match=where):
    take(spec(source), 12)
  evaluation = pipeline.eval_batches(
    source,
    'train',
    batch_size=8,
    preprocessing=preprocessing.EvalPreprocessing(16, margin=0),
  )
  with pytest.raises(faults.BadDataError, match=where):
    list(evaluation)


def test_allowed_bad_records_are_logged_once_and_skipped(tmp_path, good):
  bad, _ = store(tmp_path / 'bad', bad_images=[7], bad_labels={30: 99})
  lines = []
  batches = take(spec(bad, 2), 12, log_fn=lines.append)  # Several epochs.
  assert len(lines) == 2
  assert any('image_7.JPEG' in line and 'decoded' in line for line in lines)
  assert any('image_30.JPEG' in line and '99' in line for line in lines)
  differing = 0
  for ours, whole in zip(batches, take(spec(good), 12), strict=True):
    assert ours['weight'].min() >= 0
    np.testing.assert_allclose(ours['weight'].sum(1), 1, rtol=1e-6)
    assert ours['label'].max() < 3
    same = (ours['image'] == whole['image']).all((1, 2, 3))
    differing += np.sum(~same)
    # Random draws stay the same.
    np.testing.assert_array_equal(ours['weight'], whole['weight'])
  # Twelve batches read 192 records, of which 2 in 40 are bad.
  assert 6 <= differing <= 12
  with pytest.raises(faults.BadDataError, match='max_bad_records=2'):
    take(spec(bad, 1), 12)


@pytest.mark.slow
def test_stream_with_bad_records_resumes_bit_for_bit(tmp_path):
  source, _ = store(tmp_path, bad_images=[3, 21])
  whole = take(spec(source, 2), 9)
  for start in (1, 6):
    assert_same(take(spec(source, 2), 9 - start, start), whole[start:])


@pytest.mark.slow
def test_records_before_the_resumed_one_are_not_decoded(tmp_path):
  plain = preprocessing.Augmentation(crop='distorted')
  source, _ = store(tmp_path, bad_images=(0, 9, 23))
  epoch = GOOD // 8
  usable = [
    batch['weight'].min() > 0
    for batch in take(spec(source, GOOD, plain), 3 * epoch)
  ]
  starts = [
    step
    for step, good in enumerate(usable)
    if good and not all(usable[step - step % epoch : step])
  ]
  assert starts, 'choose another seed'
  for start in starts:
    assert take(spec(source, 0, plain), 1, start)[0]['step'] == start


def test_unmixed_bad_record_has_weight_0(tmp_path):
  source, _ = store(tmp_path, bad_images=[7])
  plain = preprocessing.Augmentation(crop='distorted')
  batches = take(spec(source, 1, plain), 5)  # An epoch.
  weights = np.concatenate([batch['weight'] for batch in batches])
  assert sorted(weights[:, 0]) == [0] + [1] * (GOOD - 1)


def test_evaluation_skips_allowed_bad_records(tmp_path):
  source, _ = store(tmp_path, bad_images=[7], bad_labels={8: 3})
  lines = []
  batches = pipeline.eval_batches(
    source,
    'train',
    batch_size=16,
    preprocessing=preprocessing.EvalPreprocessing(16, margin=0),
    max_bad_records=2,
    log_fn=lines.append,
  )
  assert sum(batch['mask'].sum() for batch in batches) == GOOD - 2
  assert len(lines) == 2


@pytest.mark.slow
def test_damaged_file_is_named(tmp_path):
  source, path = store(tmp_path)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  with pytest.raises(faults.BadDataError, match=f'after record .*{path.name}'):
    take(spec(source, 5), 12)


@pytest.mark.slow
def test_short_file_is_named(tmp_path):
  source, path = store(tmp_path)
  kept = list(tf.data.TFRecordDataset(str(path)).take(GOOD - 3))
  with tf.io.TFRecordWriter(str(path)) as writer:
    for record in kept:
      writer.write(record.numpy())
  message = f'{path.name} ends after {GOOD - 3} records; there should be {GOOD}'
  with pytest.raises(faults.BadDataError, match=message):
    take(spec(source), 12)
  evaluation = pipeline.eval_batches(
    source,
    'train',
    batch_size=8,
    preprocessing=preprocessing.EvalPreprocessing(16, margin=0),
  )
  with pytest.raises(faults.BadDataError, match=message):
    list(evaluation)


def test_file_that_vanishes_is_named(tmp_path):
  source, path = store(tmp_path)
  path.unlink()
  with pytest.raises(faults.BadDataError, match=path.name):
    take(spec(source), 12)


BUSY = tf.errors.UnavailableError(None, None, 'the bucket is busy')
DAMAGED = tf.errors.DataLossError(None, None, 'corrupted record')


class Failing:
  """A stream of batches that cannot be read at times."""

  def __init__(self, *failures, error=BUSY, total=9):
    self.error = error
    self.total = total
    self.failures = list(failures)  # Batches before which a read fails once.
    self.calls = []

  def __call__(self, start, skip_errors):
    self.calls.append((start, skip_errors))
    return self

  def as_numpy_iterator(self):
    for number in range(self.calls[-1][0], self.total):
      if number in self.failures:
        self.failures.remove(number)
        raise self.error
      yield {
        'id': np.array([number]),
        'usable': np.array([True]),
        'number': number,
      }


def iterate(stream, source):
  (slices,) = source.shards('train', 1)
  bad_records = faults.BadRecords(source, 'train', slices, 0, print)
  return list(faults.fault_tolerant_batches(stream, 0, bad_records))


def test_stream_waits_and_tries_again_after_outages(good, monkeypatch, capsys):
  monkeypatch.setattr(failures, 'DELAYS_S', (1, 4, 16))
  waited = []
  monkeypatch.setattr(time, 'sleep', waited.append)
  busy = Failing(3, 3, 3, 5)
  numbers = [batch['number'] for batch in iterate(busy, good)]
  assert numbers == list(range(9))
  assert busy.calls == [(start, False) for start in (0, 3, 3, 3, 5)]
  assert waited == [1, 4, 16, 1]
  first, *_ = capsys.readouterr().out.splitlines()
  assert first == (
    'Reading data failed: the bucket is busy. Trying again in 1 s.'
  )


def test_opening_a_dataset_is_tried_again_after_outages(good, monkeypatch):
  monkeypatch.setattr(failures, 'DELAYS_S', (0, 0))
  get_builder, tried = sources.get_builder, []

  def busy(*args):
    tried.append(args)
    if len(tried) < 3:
      raise BUSY
    return get_builder(*args)

  monkeypatch.setattr(sources, 'get_builder', busy)
  folder = str(pathlib.Path(good.data_dir_root).parents[1])
  opened = sources.load('corrupt', folder)
  assert opened.num_examples('train') == GOOD
  tried = []
  monkeypatch.setattr(failures, 'DELAYS_S', (0,))
  message = r"Opening 'corrupt' failed \(the bucket is busy\)"
  with pytest.raises(OSError, match=message) as info:
    sources.load('corrupt', folder)
  assert failures.is_outage(info.value)


def test_stream_stops_skipping_errors_after_enough_good_batches(good):
  damaged = Failing(3, 1006, error=DAMAGED, total=2009)
  numbers = [batch['number'] for batch in iterate(damaged, good)]
  assert numbers == list(range(2009))
  assert damaged.calls == [
    (0, False),
    (3, True),
    (1003, False),
    (1006, True),
    (2006, False),
  ]


def test_files_that_can_be_read_again_are_not_called_bad(good):
  message = 'the bucket is busy; read again, all files are intact'
  with pytest.raises(faults.ReadError, match=message):
    iterate(Failing(3, 3, 3, 3), good)


def test_files_that_cannot_be_read_for_now_are_not_called_bad(
  good, monkeypatch
):
  monkeypatch.setattr(
    type(good),
    'read',
    lambda self, file: Failing(0)(0, True).as_numpy_iterator(),
  )
  message = r'after record 0 of .*\.tfrecord.*: the bucket is busy'
  with pytest.raises(faults.ReadError, match=message):
    iterate(Failing(3, 3, 3, 3), good)
