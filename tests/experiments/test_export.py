"""The command that exports weights."""

import json
import tempfile

import jax
import numpy as np
import pytest

import nfnet_jax
from nfnet_jax.experiments import export
from nfnet_jax.export import fold, onnx_file, saved_model
from tests import trained_weights

FILES = {'model.json', 'model.stablehlo', 'weights.npz'}


@pytest.fixture
def weights(tmp_path):
  """Return the flag with a file of weights."""
  _, trained = trained_weights.random_weights('bn_resnet_pico', margin=3)
  path = tmp_path / 'weights.npz'
  nfnet_jax.save_weights(path, trained)
  return f'--weights={path}'


def names(folder):
  return {path.name for path in folder.iterdir()}


def test_files_that_are_written(run_command, tmp_path, weights):
  out = tmp_path / 'new' / 'exported'
  code, printed, err = run_command(
    export.main, weights, f'--out={out}', '--size=40'
  )
  assert (code, err) == (0, '')
  assert '10 batch norms into convolutions, 6 left' in printed
  assert 'at 40 px' in printed
  assert names(out) == FILES
  facts = json.loads((out / 'model.json').read_text())
  assert facts.pop('calling_convention_version') >= 10
  assert facts == {
    'model': 'bn_resnet_pico',
    'size': 40,
    'crop': 'centre',
    'margin': 3,
    'class_names': [f'class {index}' for index in range(10)],
    'platforms': ['cpu', 'cuda', 'tpu'],
    'jax_version': jax.__version__,
    'nfnet_jax_version': nfnet_jax.__version__,
  }
  with np.load(out / 'weights.npz', allow_pickle=False) as arrays:
    assert arrays['ResNet/~/final_bn/scale'].shape == (128,)
    assert not any('ema' in name for name in arrays.files)
  program = (out / 'model.stablehlo').read_bytes()
  loaded = jax.export.deserialize(bytearray(program))
  assert str(loaded.in_avals[-1]) == 'float32[batch,40,40,3]'


@pytest.mark.slow
def test_report(run_command, tmp_path, weights):
  flags = weights, f'--out={tmp_path}/exported', '--json'
  code, printed, err = run_command(export.main, *flags)
  assert (code, err) == (0, '')
  report = json.loads(printed)
  assert set(report.pop('files')) == FILES
  assert 0 < report.pop('difference') < 2e-6
  assert report == {
    'model': 'bn_resnet_pico',
    'size': 32,
    'parameters': 35_530,
    'standardized': 0,
    'merged': 10,
    'kept': 6,
  }


@pytest.mark.slow
def test_an_earlier_export_is_replaced_as_one(
  run_command, tmp_path, weights, monkeypatch
):
  out = tmp_path / 'exported'
  flags = weights, f'--out={out}'
  assert run_command(export.main, *flags, '--size=40')[0] == 0

  def fail(*args, **kwargs):
    raise OSError('disk full')

  with monkeypatch.context() as patch:
    patch.setattr(saved_model, 'check', lambda: None)
    patch.setattr(saved_model, 'save', lambda folder, *rest: folder.mkdir())
    patch.setattr(onnx_file, 'save', fail)  # The last that is written.
    with pytest.raises(OSError, match='disk full'):
      run_command(export.main, *flags, '--saved_model', '--onnx')
  facts = json.loads((out / 'model.json').read_text())
  assert facts['size'] == 40
  assert names(out) == FILES
  (out / 'weights.npz.tmp').write_text('left by a process that was killed')
  assert run_command(export.main, *flags)[0] == 0
  facts = json.loads((out / 'model.json').read_text())
  assert facts['size'] == 32
  assert names(out) == FILES


@pytest.mark.slow
def test_saved_model(run_command, tmp_path, weights):
  import tensorflow as tf

  out = tmp_path / 'exported'
  flags = weights, f'--out={out}'
  try:
    saved_model.check()
  except ValueError:
    code, _, err = run_command(export.main, *flags, '--saved_model')
    assert code == 2
    assert 'is too old for the programs of JAX' in err
    return
  for _ in range(2):  # The second export replaces the first.
    assert run_command(export.main, *flags, '--saved_model')[0] == 0
  assert names(out) == FILES | {'saved_model'}
  loaded = tf.saved_model.load(out / 'saved_model')
  shares = loaded.predict(tf.zeros((2, 32, 32, 3)))['probabilities']
  np.testing.assert_allclose(np.sum(shares, 1), 1, rtol=1e-5)
  # Without the flag it would remain, with the old weights.
  code, _, err = run_command(export.main, *flags)
  assert (code, "holds 'saved_model'" in err) == (2, True)


@pytest.mark.slow
def test_onnx(run_command, tmp_path, weights):
  out = tmp_path / 'exported'
  for _ in range(2):  # The second export replaces the first.
    flags = weights, f'--out={out}', '--onnx'
    assert run_command(export.main, *flags)[0] == 0
  assert names(out) == FILES | {'onnx'}
  assert names(out / 'onnx') == {'model.onnx'}
  code, _, err = run_command(export.main, weights, f'--out={out}')
  assert (code, "holds 'onnx'" in err) == (2, True)


def test_a_fold_that_changes_logits_is_refused(
  run_command, tmp_path, weights, monkeypatch
):
  def wrong(*args):
    folded = real(*args)
    folded.params['ResNet/~/final_bn']['offset'] += wrong.change
    return folded

  real = fold.fold
  monkeypatch.setattr(fold, 'fold', wrong)
  for change in (1e-2, np.nan):
    wrong.change = change
    out = tmp_path / 'exported'
    code, printed, err = run_command(export.main, weights, f'--out={out}')
    assert (code, printed) == (2, '')
    assert 'these weights are not exported' in err
    assert len(err.splitlines()) == 1
    assert not names(out)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--out={tmp}/out'], '--weights=PATH.'),
    (
      ['--weights={tmp}/none', '--out={tmp}/out'],
      "There are no weights '{tmp}/none'",
    ),
    (
      ['{weights}', '--out={tmp}/weights.npz'],
      "--out='{tmp}/weights.npz': File exists. Name a folder that",
    ),
    (['{weights}', '--out={tmp}'], "holds 'weights.npz'; give a new or an emp"),
    (['{weights}', '--out=/proc/exported'], "'/proc/exported'"),
    (['{weights}', '--out={tmp}/out', '--size=0'], '--size=0: 0 is not a posi'),
    (['{weights}', '--out={tmp}/out', 'extra'], "Unexpected argument 'extra'"),
  ],
)
def test_bad_input(run_command, tmp_path, weights, monkeypatch, flags, message):
  monkeypatch.setattr(fold, 'fold', None)  # Before any work.
  flags = [flag.format(tmp=tmp_path, weights=weights) for flag in flags]
  code, printed, err = run_command(export.main, *flags)
  assert (code, printed) == (2, '')
  assert not (tmp_path / 'out').exists()
  assert err.startswith('nfnet_jax: ')
  assert message.format(tmp=tmp_path) in err
  assert len(err.splitlines()) == 1


def test_a_folder_that_cannot_be_written(
  run_command, tmp_path, weights, monkeypatch
):
  def refuse(dir):
    raise PermissionError(13, 'Permission denied', str(dir))

  monkeypatch.setattr(tempfile, 'TemporaryFile', refuse)
  code, _, err = run_command(export.main, weights, f'--out={tmp_path}/out')
  assert code == 2
  assert f"--out='{tmp_path}/out': Permission denied." in err
