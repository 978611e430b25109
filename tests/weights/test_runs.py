"""Weights of a run: of its folder, or of one of its checkpoints."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

import nfnet_jax
from nfnet_jax import preprocessing
from nfnet_jax.config import experiment as experiment_lib
from nfnet_jax.config import workdir as workdir_lib
from nfnet_jax.experiments.configs import digits
from nfnet_jax.training import checkpoint, state
from nfnet_jax.weights import load
from tests.weights import trees


def averaged(step, name):
  """What the checkpoint of a step holds as averages."""
  return trees.filled(name, seed=step)


def make_run(workdir, name):
  config = digits.get_config()
  config.model.name = name
  if name == 'nfnet_pico':
    config.model.activation = 'relu'
  else:
    config.model.stochdepth_rate = None
  config.data.eval_crop = 'centre'
  names = [f'digit {number}' for number in range(10)]
  workdir_lib.save(experiment_lib.prepare_config(config), workdir, names)
  raw, raw_state = trees.filled(name, seed=99)
  with checkpoint.Checkpoints(workdir / 'checkpoints') as checkpoints:
    for step in (3, 6, 9):
      params, model_state = averaged(step, name)
      checkpoints.save(
        state.TrainState(
          step=np.int32(step),
          params=raw,
          model_state=raw_state,
          opt_state={'trace': raw},
          ema_params=params,
          ema_model_state=model_state,
        )
      )
  return workdir


@pytest.fixture(scope='module', params=['nfnet_pico', 'bn_resnet_pico'])
def model(request):
  return request.param


@pytest.fixture(scope='module')
def made(tmp_path_factory, model):
  return make_run(tmp_path_factory.mktemp('runs') / 'run', model)


@pytest.fixture
def run(made, tmp_path):
  """A run that may be damaged."""
  return shutil.copytree(made, tmp_path / 'run')


def assert_holds(weights, step, model):
  params, model_state = averaged(step, model)
  trees.assert_equal(weights.params, params)
  trees.assert_equal(weights.model_state, model_state)
  assert (weights.model, weights.num_classes) == (model, 10)


def one_line(path, match):
  with pytest.raises(load.WeightsError, match=match) as info:
    nfnet_jax.load_weights(path)
  assert '\n' not in str(info.value)
  assert f"'{path}'" in str(info.value)


def files_below(folder):
  return {
    path: path.read_bytes() for path in folder.rglob('*') if path.is_file()
  }


def test_averages_of_the_newest_checkpoint(made, model):
  before = files_below(made)
  weights = nfnet_jax.load_weights(made)
  assert_holds(weights, 9, model)
  assert weights.options == (
    {'activation': 'relu'} if model == 'nfnet_pico' else {}
  )
  assert weights.preprocessing == preprocessing.EvalPreprocessing(
    32, 'centre', 0
  )
  assert weights.class_names[9] == 'digit 9'
  assert files_below(made) == before  # Reading changes nothing.


@pytest.mark.parametrize(
  ('below', 'step'),
  [('checkpoints', 9), ('checkpoints/3', 3), ('checkpoints/6/', 6)],
)
def test_folders_of_a_run(made, model, below, step):
  assert_holds(nfnet_jax.load_weights(f'{made}/{below}'), step, model)


@pytest.mark.parametrize(
  ('start', 'path', 'step'),
  [
    ('..', 'run', 9),
    ('.', '.', 9),
    ('.', 'checkpoints/3', 3),
    ('checkpoints', '.', 9),
    ('checkpoints', '6', 6),
    ('checkpoints/3', '.', 3),
  ],
)
def test_relative_paths(made, model, monkeypatch, start, path, step):
  monkeypatch.chdir(made / start)
  assert_holds(nfnet_jax.load_weights(path), step, model)


def test_class_names_of_a_run(run):
  names = [f'digit {number}' for number in range(10)]
  (run / 'classes.txt').write_text('\n'.join(names) + '\n')
  assert nfnet_jax.load_weights(run).class_names == tuple(names)
  (run / 'classes.txt').write_text('one\ntwo\n')
  one_line(run, '10 classes and 2 names')


def cut(directory):
  for path in (directory / 'state').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:50])


def disagree(directory):
  """Changes the checksum of an averaged tensor."""
  for path in directory.rglob('*'):
    if path.is_file() and b'"ema_params/' in (text := path.read_bytes()):
      path.write_bytes(
        re.sub(rb'("ema_params/[^"]*": ?)(\d+)', rb'\g<1>1', text)
      )


@pytest.mark.parametrize('how', ['disagrees', 'cut'])
def test_an_unreadable_newest_checkpoint(run, model, caplog, how):
  newest = run / 'checkpoints' / '9'
  disagree(newest) if how == 'disagrees' else cut(newest)
  assert_holds(nfnet_jax.load_weights(run), 6, model)
  assert 'Checkpoint 9 cannot be read' in caplog.text
  one_line(run / 'checkpoints' / '9', 'can be read')


def test_no_readable_checkpoint(run):
  for step in (3, 6, 9):
    disagree(run / 'checkpoints' / str(step))
  one_line(run, r'None of the checkpoints \[3, 6, 9\]')


@pytest.mark.parametrize('gone', ['state', 'checksums', 'state/_METADATA'])
def test_a_checkpoint_without_its_parts(run, model, gone):
  path = run / 'checkpoints' / '9' / gone
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  assert_holds(nfnet_jax.load_weights(run), 6, model)
  one_line(run / 'checkpoints' / '9', 'can be read')


def test_no_such_checkpoint(run):
  one_line(run / 'checkpoints' / '4', 'There are no weights')
  (run / 'checkpoints' / '4').mkdir()
  one_line(run / 'checkpoints' / '4', 'cannot be used')
  (run / 'checkpoints' / '9.unreadable').mkdir()
  one_line(run / 'checkpoints' / '9.unreadable', 'cannot be used')


def test_folders_without_a_run(run, tmp_path):
  one_line(tmp_path, 'holds no run with a checkpoint')
  (run / 'other').mkdir()
  one_line(run / 'other', 'holds no run with a checkpoint')
  one_line(run / 'checkpoints' / '9' / 'state', 'holds no run')
  shutil.rmtree(run / 'checkpoints')
  one_line(run, 'holds no run with a checkpoint')
  (run / 'checkpoints').mkdir()
  one_line(run, 'holds no checkpoint yet')


@pytest.mark.parametrize(
  'text',
  [
    '',
    '{',
    '[]',
    '{}',
    '{"model": 3, "data": {}}',
    '{"model": {"name": "nfnet_pico"}}',
    '{"model": {}, "data": {}}',
    '\xff',
    '[' * 100_000,
  ],
  ids=lambda text: text[:30],
)
def test_damaged_configurations(run, text):
  (run / 'config.json').write_text(text, encoding='latin1')
  one_line(run, 'config.json.* is damaged')


@pytest.mark.parametrize(
  ('key', 'value', 'match'),
  [
    (('model', 'name'), 3, '3 as model'),
    (('model', 'name'), 'nfnet_pica', "Unknown model 'nfnet_pica'"),
    (('model', 'name'), 'nf_resnet_pico', 'they differ in'),
    (('data', 'eval_size'), 'x', "'x' as size"),
  ],
)
def test_wrong_configurations(run, key, value, match):
  config = json.loads((run / 'config.json').read_text())
  config[key[0]][key[1]] = value
  (run / 'config.json').write_text(json.dumps(config))
  one_line(run, match)


def test_some_fields_alone(made, model):
  with checkpoint.Checkpoints(
    made / 'checkpoints', read_only=True
  ) as checkpoints:
    fields = checkpoints.restore_fields(['step', 'params'])
    assert fields.keys() == {'step', 'params'}
    assert fields['step'] == 9
    trees.assert_equal(fields['params'], trees.filled(model, seed=99)[0])
    leaves = jax.tree.leaves(fields)
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
    fields = checkpoints.restore_fields(['ema_params'], step=3)
    trees.assert_equal(fields['ema_params'], averaged(3, model)[0])


def test_fields_that_are_not_there(made):
  with checkpoint.Checkpoints(
    made / 'checkpoints', read_only=True
  ) as checkpoints:
    with pytest.raises(checkpoint.UnreadableError, match='has no checkpoint 4'):
      checkpoints.restore_fields(['params'], step=4)
    with pytest.raises(checkpoint.UnreadableError, match='colour'):
      checkpoints.restore_fields(['colour'])
