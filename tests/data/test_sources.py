"""Datasets by name, and the errors when one is missing."""

import shutil

import numpy as np
import pytest
import tensorflow as tf

from nfnet_jax import preprocessing
from nfnet_jax.data import folders, pipeline, sources
from tests import imagenet


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    (
      'cifar10',
      'is not prepared under .* run: .* -m nfnet_jax.experiments.prepare '
      'cifar10 --data_dir=',
    ),
    ('no_such_set', "TFDS knows no dataset 'no_such_set'.*digits"),
    ('no/such/folder', "'no/such/folder', .* there is no such folder"),
  ],
)
def test_error_of_a_missing_dataset_says_what_to_do(name, message, data_dir):
  with pytest.raises(sources.MissingDatasetError, match=message):
    sources.load(name, data_dir)


@pytest.mark.parametrize('split', ['validation', 'train[:3%', 'train[0:9999]'])
def test_missing_split_is_named(digits, split):
  with pytest.raises(sources.MissingDatasetError, match='train, test'):
    digits.num_examples(split)


def ids(source, split, shards=1):
  """Return the keys of a split's records, in order."""
  found = []
  for part in source.shards(split, shards):
    for file in part:
      found += [source.key(record.numpy()) for record in source.read(file)]
  return found


def test_held_out_images_are_disjoint_and_complete(small_imagenet):
  train, held_out = (
    ids(small_imagenet, split) for split in ('train[10:]', 'train[:10]')
  )
  assert len(train) == small_imagenet.num_examples('train[10:]') == 86
  assert len(held_out) == small_imagenet.num_examples('train[:10]') == 10
  whole = ids(small_imagenet, 'train')
  assert sorted(train + held_out) == sorted(whole)
  assert len(set(whole)) == 96
  validation = ids(small_imagenet, 'validation')
  assert len(set(validation)) == 37
  assert not set(validation) & set(whole)


@pytest.mark.parametrize('shards', [2, 7])
def test_shards_hold_every_example_once(small_imagenet, shards):
  for split in ('train', 'train[10:]'):
    one, many = (ids(small_imagenet, split, count) for count in (1, shards))
    assert sorted(one) == sorted(many)


def test_missing_file_is_named(small_imagenet, imagenet_dir, tmp_path):
  shutil.copytree(imagenet_dir, tmp_path, dirs_exist_ok=True)
  (shard,) = tmp_path.glob('imagenet2012/*/*train*00001*')
  shard.unlink()
  source = sources.load('imagenet2012', str(tmp_path))
  with pytest.raises(sources.MissingDatasetError, match=shard.name):
    source.check_files('train')
  source.check_files('validation')
  small_imagenet.check_files('train')


COLOURS = {'blue': (0, 0, 255), 'green': (0, 255, 0), 'red': (255, 0, 0)}


def write_folder(root, images=6, splits=('train', 'validation')):
  """Write images of one colour per class, in several formats."""
  formats = ('JPEG', 'PNG', 'GIF', 'BMP', 'jpg')
  for split in splits:
    for name, colour in COLOURS.items():
      folder = f'{root}/{split}/{name}'
      tf.io.gfile.makedirs(folder)
      for index in range(images):
        ending = formats[index % len(formats)]
        kind = ending.replace('jpg', 'JPEG')
        image = imagenet.Image.new('RGB', (12, 9), colour)
        with tf.io.gfile.GFile(f'{folder}/{index}.{ending}', 'wb') as file:
          file.write(imagenet.encoded(image, kind))


@pytest.fixture(params=['disk', 'ram'])
def root(request, tmp_path):
  """A folder, local or on a file system that only TensorFlow knows."""
  folder = str(tmp_path) if request.param == 'disk' else 'ram://images'
  write_folder(folder)
  return folder


def read(source, split):
  batches = pipeline.eval_batches(
    source,
    split,
    batch_size=5,
    preprocessing=preprocessing.EvalPreprocessing(8, margin=0),
  )
  batches = list(batches)
  mask = np.concatenate([batch['mask'] for batch in batches]) > 0
  stacked = lambda name: np.concatenate([batch[name] for batch in batches])
  return stacked('image')[mask], stacked('label')[mask]


def test_folder_of_images_is_a_dataset(root):
  source = sources.load(root)
  assert source.class_names == ('blue', 'green', 'red')
  assert source.splits == ['train', 'validation']
  source.check_files('train')
  for split in ('train', 'validation', 'train[50%:]+validation[:4]'):
    images, labels = read(source, split)
    assert len(labels) == source.num_examples(split)
    np.testing.assert_array_equal(images.mean((1, 2)).argmax(1), 2 - labels)
  halves = ids(source, 'train[:50%]') + ids(source, 'train[50%:]')
  assert sorted(halves) == sorted(ids(source, 'train'))
  assert ids(source, 'train')[0].startswith(root)


def test_folder_without_splits_is_train_and_slices_hold_all_classes(tmp_path):
  write_folder(tmp_path, images=20, splits=('.',))
  source = sources.load(str(tmp_path))
  assert source.splits == ['train']
  assert source.num_examples('train') == 60
  for split in ('train[:25%]', 'train[25%:]'):
    assert set(read(source, split)[1]) == {0, 1, 2}


def test_folder_order_does_not_depend_on_its_path(tmp_path):
  for name in ('a', 'b/c'):
    write_folder(tmp_path / name)
  names = [
    [key.split('/')[-2:] for key in ids(folders.FolderSource(path), 'train')]
    for path in (f'{tmp_path}/a', f'{tmp_path}/b/c/')
  ]
  assert names[0] == names[1]


def test_empty_folder_is_an_error(tmp_path):
  with pytest.raises(sources.MissingDatasetError, match='holds no images'):
    sources.load(f'{tmp_path}/')
