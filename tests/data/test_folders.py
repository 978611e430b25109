"""Folders of images of any format, and what is unusual about them."""

import io

import numpy as np
from PIL import Image
import pytest
import tensorflow as tf

from nfnet_jax import images, preprocessing
from nfnet_jax.data import (
  data_checks,
  faults,
  folders,
  formats,
  pipeline,
  preprocess,
  sources,
)

TRAIN = preprocessing.Augmentation()
EVALUATION = preprocessing.EvalPreprocessing(16, margin=0)


def picture(seed=0, size=(37, 21)):
  """Smooth noise of an odd width."""
  noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
  return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def write(path, image=None, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  (image or picture()).save(path, **options)
  return path


def fill(root, per_class=4, classes=('a', 'b'), splits=('train',)):
  for split in splits:
    for name in classes:
      for index in range(per_class):
        write(root / split / name / f'{index}.png', picture(index))


def warnings(root, train='train', evaluation='train'):
  source = folders.FolderSource(str(root))
  return '\n'.join(data_checks.folder_warnings(source, train, evaluation))


def check_images(root, max_count=0, seconds=60.0, splits=('train',)):
  source = folders.FolderSource(str(root))
  return list(data_checks.check_images(source, splits, max_count, seconds))


@pytest.mark.parametrize(
  ('name', 'mode', 'options'),
  [
    ('a.webp', 'RGB', {'lossless': True}),
    ('a.webp', 'RGBA', {'lossless': True}),
    ('a.tiff', 'RGB', {}),
    ('a.tif', 'CMYK', {}),
    ('a.avif', 'RGB', {}),
    ('a.ppm', 'RGB', {}),
    ('a.bmp', 'P', {}),
    ('a.bmp', '1', {}),
    ('A.PNG', 'P', {}),
    ('a.png', 'LA', {}),
    ('a.gif', 'P', {}),
  ],
)
def test_pixels_are_those_of_predict(tmp_path, name, mode, options):
  path = write(tmp_path / 'cats' / name, picture().convert(mode), **options)
  source = folders.FolderSource(str(tmp_path))
  (record,) = source.read(source.shards('train', 1)[0][0])
  encoded, label = source.parse(record)
  assert label == 0
  np.testing.assert_array_equal(
    preprocess.decode(encoded), images.read_image(path)
  )


def test_the_contents_decide_and_not_the_ending(tmp_path):
  write(tmp_path / 'cats' / 'a.jpg', format='WEBP')
  assert not check_images(tmp_path)
  batch = next(batches(tmp_path))
  assert batch['mask'].sum() == 1


def batches(root, split='train', **options):
  return pipeline.eval_batches(
    folders.FolderSource(str(root)),
    split,
    batch_size=4,
    preprocessing=EVALUATION,
    **options,
  )


def turned(orientation):
  exif = Image.Exif()
  exif[Image.ExifTags.Base.Orientation] = orientation
  return exif


def test_photos_are_upright_and_plain_jpegs_are_not_touched(tmp_path):
  image = picture(size=(48, 32))
  for orientation in (1, 3, 6):
    path = tmp_path / 'cats' / f'{orientation}.jpg'
    write(path, image, quality=95, exif=turned(orientation))
  write(tmp_path / 'cats' / 'plain.jpg', image, quality=95)
  for path in sorted((tmp_path / 'cats').iterdir()):
    encoded = path.read_bytes()
    given = formats.for_tensorflow(tf.constant(encoded)).numpy()
    assert (given == encoded) == (path.stem in ('1', 'plain'))
    difference = np.int32(preprocess.decode(given)) - images.read_image(path)
    # The two libraries differ where colours are subsampled.
    assert np.abs(difference).mean() < 2


def test_all_formats_train_and_evaluate(tmp_path):
  for index, ending in enumerate(('jpg', 'webp', 'tiff', 'png')):
    for copy in range(2):
      write(tmp_path / 'ab'[copy] / f'{index}.{ending}', picture(index))
  spec = pipeline.TrainSpec(
    source=folders.FolderSource(str(tmp_path)),
    split='train',
    batch_size=8,
    image_size=16,
    shards=2,
    seed=0,
    augmentation=preprocessing.Augmentation(crop='distorted', flip=True),
  )
  batch = next(pipeline.train_batches(spec))
  assert batch['image'].shape == (8, 16, 16, 3)
  assert sorted(batch['label'].ravel()) == [0] * 4 + [1] * 4
  assert sum(batch['mask'].sum() for batch in batches(tmp_path)) == 8


def test_a_folder_may_be_named_without_a_slash(tmp_path, monkeypatch):
  fill(tmp_path / 'photos')
  fill(tmp_path / 'digits')
  monkeypatch.chdir(tmp_path)
  assert sources.load('photos').class_names == ('a', 'b')
  assert sources.load('./digits').class_names == ('a', 'b')
  # A dataset of TFDS or of this package comes first.
  assert sources.load('digits', str(tmp_path / 'tfds')).num_classes == 10


def test_files_that_are_left_out_are_counted_and_named(tmp_path):
  fill(tmp_path)
  assert not warnings(tmp_path)
  for name in ('train/a/x.txt', 'train/a/y.txt', 'train/a/.DS_Store'):
    (tmp_path / name).write_text('')
  write(tmp_path / 'train' / 'a' / 'deep' / 'z.png')
  (tmp_path / 'train' / 'c').mkdir()
  text = warnings(tmp_path)
  assert '3 files are left out' in text
  assert '2 .txt' in text
  assert 'x.txt' in text
  assert f'1 {folders.ELSEWHERE}' in text
  assert f'empty: {tmp_path}/train/c.' in text
  assert 'DS_Store' not in text


def test_one_class_is_a_warning(tmp_path):
  fill(tmp_path, classes=('a',))
  assert "only one class, 'a'" in warnings(tmp_path)


def test_classes_in_one_split_only_are_named(tmp_path):
  fill(tmp_path, splits=('train', 'validation'))
  fill(tmp_path, splits=('train',), classes=('c',))
  fill(tmp_path, splits=('validation',), classes=('d',))
  text = warnings(tmp_path, evaluation='validation')
  assert "'train' has no images of d." in text
  assert "'validation' has no images of c." in text


@pytest.mark.parametrize(
  ('names', 'used', 'is_warned'),
  [
    (('train', 'Train'), 'train[:50%]', True),
    (('train', 'val', 'validation'), 'validation', True),
    (('train', 'test'), 'test', False),
    (('train', 'test'), 'train[:50%]+test', False),
  ],
)
def test_splits_of_similar_names(tmp_path, names, used, is_warned):
  fill(tmp_path, splits=names)
  text = warnings(tmp_path, evaluation=used)
  assert ('The folder has splits' in text) == is_warned


@pytest.fixture
def damaged(tmp_path):
  """A folder in which three of eight images cannot be read."""
  fill(tmp_path)
  (tmp_path / 'train' / 'a' / '0.png').write_bytes(b'')
  (tmp_path / 'train' / 'a' / '1.png').write_text('<html>')
  jpeg = io.BytesIO()
  picture(size=(200, 200)).save(jpeg, 'JPEG')
  cut = jpeg.getvalue()[: len(jpeg.getvalue()) // 2]
  (tmp_path / 'train' / 'a' / '2.png').write_bytes(cut)
  return tmp_path


def test_unreadable_images_are_named(damaged, capfd):
  with pytest.raises(faults.BadDataError) as info:
    check_images(damaged, max_count=2)
  text = str(info.value)
  assert '3 of 8 images cannot be read' in text
  assert '--config.run.max_bad_records=3' in text
  for name in ('a/0.png', 'a/1.png', 'a/2.png'):
    assert name in text
  assert 'is truncated' in text
  assert '\n' not in text
  assert capfd.readouterr() == ('', '')


def test_allowed_unreadable_images_are_skipped(damaged):
  (line,) = check_images(damaged, max_count=3)
  assert 'They are skipped' in line
  assert (
    sum(batch['mask'].sum() for batch in batches(damaged, max_bad_records=3))
    == 5
  )


def test_the_time_for_reading_images_is_limited(damaged, monkeypatch):
  monkeypatch.setattr(data_checks, '_CHUNK', 1)
  (line,) = check_images(damaged, max_count=9, seconds=0.0)
  assert '0 of 8 images' in line


def test_an_outage_is_not_called_a_bad_image(tmp_path, monkeypatch):
  fill(tmp_path)

  def fail(path, mode):
    raise tf.errors.UnavailableError(None, None, 'try again')

  monkeypatch.setattr(tf.io.gfile, 'GFile', fail)
  assert not check_images(tmp_path)


def test_common_examples_of_splits(tmp_path):
  fill(tmp_path, per_class=5, splits=('train', 'test'))
  source = folders.FolderSource(str(tmp_path))
  count = lambda *splits: sources.count_common(source, *splits)
  assert count('train[20%:]', 'train[:20%]') == 0
  assert count('train', 'train[:20%]') == 2
  assert count('train', 'test') == 0
  assert len(source.images('train[20%:]')) == 8
