"""The command that prepares datasets."""

import re
import shutil
import tarfile

import pytest
import tensorflow_datasets as tfds

from nfnet_jax.data import known, sources
from nfnet_jax.experiments import prepare


def prepared(run_command, data_dir, *arguments):
  return run_command(
    prepare.main,
    'imagenet2012',
    f'--data_dir={data_dir}',
    *arguments,
    takes='DATASET',
  )


def test_partial_imagenet_is_built_and_counted(
  run_command, imagenet_tars, tmp_path
):
  code, out, _ = prepared(
    run_command, tmp_path, f'--manual_dir={imagenet_tars}', '--partial'
  )
  assert code == 0
  assert re.search(r'train +96 images\n', out)
  assert re.search(r'validation +37 images\n', out)
  assert re.search(r'classes +1,000\n', out)
  assert f'--config.run.data_dir={tmp_path}' in out
  assert f'gcloud storage cp -r {tmp_path}/imagenet2012 gs://' in out
  source = sources.load('imagenet2012', str(tmp_path))
  assert source.num_examples('train') == 96
  # The second time it exists, and is not accepted as the complete dataset.
  code, _, err = prepared(run_command, tmp_path)
  assert code == 2
  assert "split 'train'" in err
  assert '96 examples and should have 1,281,167' in err
  assert prepared(run_command, tmp_path, '--partial')[0] == 0


def test_a_failed_download_is_one_line(run_command, tmp_path, monkeypatch):
  def fail(self, **options):
    raise ConnectionError('no route')

  monkeypatch.setattr(tfds.core.DatasetBuilder, 'download_and_prepare', fail)
  code, out, err = run_command(
    prepare.main, 'mnist', f'--data_dir={tmp_path}', takes='DATASET'
  )
  assert (code, out, len(err.splitlines())) == (1, '', 1)
  assert "'mnist' could not be downloaded or written: no route." in err


@pytest.fixture
def tars(imagenet_tars, tmp_path):
  return shutil.copytree(imagenet_tars, tmp_path / 'tars')


@pytest.mark.parametrize(
  ('corrupt', 'partial', 'message'),
  [
    (lambda tars: None, False, 'img_train.tar.* 225,280 bytes .* 147,897,477'),
    (
      lambda tars: (tars / 'ILSVRC2012_img_train.tar').unlink(),
      False,
      'There is no ILSVRC2012_img_train.tar .*https://image-net.org',
    ),
    (
      lambda tars: [tar.unlink() for tar in tars.iterdir()],
      True,
      'neither of the tars',
    ),
    (
      lambda tars: drop_first_image(tars / 'ILSVRC2012_img_val.tar'),
      True,
      'val_00000002.JPEG. where ILSVRC2012_val_00000001.JPEG should be',
    ),
  ],
)
def test_bad_tars_are_an_error(
  run_command, tars, tmp_path, corrupt, partial, message
):
  corrupt(tars)
  flags = [f'--manual_dir={tars}', *(['--partial'] if partial else [])]
  code, _, err = prepared(run_command, tmp_path, *flags)
  assert code == 2
  assert len(err.splitlines()) == 1
  assert re.search(message, err)
  assert not (tmp_path / 'imagenet2012').exists()


def drop_first_image(path):
  """TFDS would give the second image the label of the first."""
  with tarfile.open(path) as tar:
    names = sorted(tar.getnames())[1:]
    tar.extractall(path.parent, names, filter='data')
  with tarfile.open(path, 'w') as tar:
    for name in names:
      tar.add(path.parent / name, name)


def test_no_folder_of_tars(run_command, tmp_path):
  code, _, err = prepared(run_command, tmp_path)
  assert code == 2
  assert '--manual_dir=DIR' in err


def test_too_little_space(run_command, tars, tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
  code, _, err = prepared(
    run_command, tmp_path / 'new', f'--manual_dir={tars}', '--partial'
  )
  assert code == 2
  assert '0.0 GB free' in err


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'DATASET is missing'),
    (['no_such_set'], 'TFDS knows no dataset'),
    (['mnist', 'cifar10'], "Unexpected argument 'cifar10'"),
  ],
)
def test_bad_arguments(run_command, arguments, message, tmp_path):
  code, _, err = run_command(
    prepare.main, *arguments, f'--data_dir={tmp_path}', takes='DATASET'
  )
  assert code == 2
  assert message in err


def test_counts_of_the_complete_dataset_pass(
  run_command, imagenet_dir, monkeypatch
):
  def prepare_complete(**numbers):
    complete = known.Known(**numbers)
    monkeypatch.setitem(known.DATASETS, 'imagenet2012', complete)
    return prepared(run_command, imagenet_dir)

  splits = {'train': 96, 'validation': 37}
  assert prepare_complete(num_classes=1000, splits=splits)[0] == 0
  code, _, err = prepare_complete(num_classes=999, splits=splits)
  assert code == 2
  assert '1000 classes, not 999' in err
