"""Weights of a run are loaded from its folder, or from a checkpoint."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

import nfnet_jax
from nfnet_jax import preprocessing
from nfnet_jax.config import steps
from nfnet_jax.config import workdir as workdir_lib
from nfnet_jax.experiments.configs import digits
from nfnet_jax.models import registry
from nfnet_jax.training import checkpoint, state
from nfnet_jax.weights import network
from tests import trained_weights
from tests.weights import trees


def ema_of(step, name):
  """Return the EMA parameters and state in the checkpoint of a step."""
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
  workdir_lib.save(steps.prepare_config(config), workdir, names)
  raw, raw_state = trees.filled(name, seed=99)
  with checkpoint.Checkpoints(workdir / 'checkpoints') as checkpoints:
    for step in (3, 6, 9):
      params, model_state = ema_of(step, name)
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


@pytest.fixture(
  scope='module',
  params=[
    'nfnet_pico',
    pytest.param('bn_resnet_pico', marks=pytest.mark.slow),
  ],
)
def model(request):
  return request.param


@pytest.fixture(scope='module')
def made(tmp_path_factory, model):
  return make_run(tmp_path_factory.mktemp('runs') / 'run', model)


@pytest.fixture
def run(made, tmp_path):
  """Return a copy of the run, which a test may damage."""
  return shutil.copytree(made, tmp_path / 'run')


def assert_holds(weights, step, model):
  params, model_state = ema_of(step, model)
  trees.assert_equal(weights.params, params)
  trees.assert_equal(weights.model_state, model_state)
  assert (weights.model, weights.num_classes) == (model, 10)


def assert_refused(path, match):
  with pytest.raises(network.WeightsError, match=match) as info:
    nfnet_jax.load_weights(path)
  assert '\n' not in str(info.value)
  assert f"'{path}'" in str(info.value)


def files_below(folder):
  return {
    path: path.read_bytes() for path in folder.rglob('*') if path.is_file()
  }


def test_ema_of_the_newest_checkpoint(made, model):
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


def test_a_folder_that_is_no_checkpoint(run):
  (run / 'checkpoints' / 'old').mkdir()
  assert_refused(run / 'checkpoints' / 'old', 'holds no run')


def test_a_run_in_a_folder_named_checkpoints(made, model, tmp_path):
  shutil.copytree(made, tmp_path / 'checkpoints' / 'mine')
  path = tmp_path / 'checkpoints' / 'mine'
  assert_holds(nfnet_jax.load_weights(path), 9, model)


@pytest.mark.parametrize(
  ('start', 'path', 'step'),
  [
    ('..', 'run', 9),
    ('checkpoints', '6', 6),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ('.', '.', 9),
        ('.', 'checkpoints/3', 3),
        ('checkpoints', '.', 9),
        ('checkpoints/3', '.', 3),
      )
    ),
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
  assert_refused(run, '10 classes and 2 names')


def truncate(directory):
  for path in (directory / 'state').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:50])


def change_checksum(directory):
  """Change the checksum of an EMA tensor."""
  for path in directory.rglob('*'):
    if path.is_file() and b'"ema_params/' in (text := path.read_bytes()):
      path.write_bytes(
        re.sub(rb'("ema_params/[^"]*": ?)(\d+)', rb'\g<1>1', text)
      )


@pytest.mark.parametrize('how', ['checksum', 'truncated'])
def test_an_unreadable_newest_checkpoint(run, model, caplog, how):
  newest = run / 'checkpoints' / '9'
  change_checksum(newest) if how == 'checksum' else truncate(newest)
  assert_holds(nfnet_jax.load_weights(run), 6, model)
  assert 'Checkpoint 9 cannot be read' in caplog.text
  assert_refused(run / 'checkpoints' / '9', 'can be read')


def test_no_readable_checkpoint(run):
  for step in (3, 6, 9):
    change_checksum(run / 'checkpoints' / str(step))
  assert_refused(run, r'None of the checkpoints \[3, 6, 9\]')


@pytest.mark.parametrize(
  'gone',
  [
    'checksums',
    *(
      pytest.param(each, marks=pytest.mark.slow)
      for each in ('state', 'state/_METADATA')
    ),
  ],
)
def test_an_incomplete_checkpoint(run, model, gone):
  path = run / 'checkpoints' / '9' / gone
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  assert_holds(nfnet_jax.load_weights(run), 6, model)
  assert_refused(run / 'checkpoints' / '9', 'can be read')


def test_no_such_checkpoint(run):
  assert_refused(run / 'checkpoints' / '4', 'There are no weights')
  (run / 'checkpoints' / '4').mkdir()
  assert_refused(run / 'checkpoints' / '4', 'cannot be used')
  (run / 'checkpoints' / '9.unreadable').mkdir()
  assert_refused(run / 'checkpoints' / '9.unreadable', 'cannot be used')


def test_folders_without_a_run(run, tmp_path):
  assert_refused(tmp_path, 'holds no run with a checkpoint')
  (run / 'other').mkdir()
  assert_refused(run / 'other', 'holds no run with a checkpoint')
  assert_refused(run / 'checkpoints' / '9' / 'state', 'holds no run')
  shutil.rmtree(run / 'checkpoints')
  assert_refused(run, 'holds no run with a checkpoint')
  (run / 'checkpoints').mkdir()
  assert_refused(run, 'holds no checkpoint yet')


@pytest.mark.parametrize(
  'text',
  [
    '{',
    '{"model": 3, "data": {}}',
    *(
      pytest.param(text, marks=pytest.mark.slow)
      for text in (
        '',
        '[]',
        '{}',
        '{"model": {"name": "nfnet_pico"}}',
        '{"model": {}, "data": {}}',
        '\xff',
        '[' * 100_000,
      )
    ),
  ],
  ids=lambda text: text[:30],
)
def test_damaged_configurations(run, text):
  (run / 'config.json').write_text(text, encoding='latin1')
  assert_refused(run, 'config.json.* is damaged')


@pytest.mark.parametrize(
  ('key', 'value', 'match'),
  [
    (('model', 'name'), 3, '3 as model'),
    (('model', 'name'), 'nfnet_pica', "Unknown model 'nfnet_pica'"),
    (('model', 'name'), 'nf_resnet_pico', 'they differ in'),
    (('model', 'colour'), 1, 'cannot be built with .*colour'),
    (('data', 'eval_size'), 'x', "size is 'x', not an integer"),
  ],
)
def test_wrong_configurations(run, key, value, match):
  config = json.loads((run / 'config.json').read_text())
  config[key[0]][key[1]] = value
  (run / 'config.json').write_text(json.dumps(config))
  assert_refused(run, match)


@pytest.fixture(
  params=[
    trained_weights.OLD_CONFIGS[0],
    *(
      pytest.param(config, marks=pytest.mark.slow)
      for config in (None, *trained_weights.OLD_CONFIGS[1:])
    ),
  ]
)
def old_pico(request, tmp_path):
  """Return a run of `nfnet_pico` and, as a dict, its config of some age."""
  _, weights = trained_weights.random_weights('nfnet_pico')
  trained_weights.write_run(tmp_path / 'run', weights, request.param)
  config = json.loads((tmp_path / 'run' / 'config.json').read_text())
  return tmp_path / 'run', config


def load_with(workdir, config):
  (workdir / 'config.json').write_text(json.dumps(config))
  return nfnet_jax.load_weights(workdir)


def test_old_runs_are_loaded(old_pico):
  workdir, config = old_pico
  weights = nfnet_jax.load_weights(workdir)
  activation = config['model'].get('activation')
  assert weights.options == ({'activation': activation} if activation else {})
  margin = config['data']['eval_margin']
  expected = preprocessing.EvalPreprocessing(32, 'squash', margin)
  assert weights.preprocessing == expected


def test_runs_without_settings_have_the_defaults(old_pico):
  workdir, _ = old_pico
  weights = load_with(workdir, {'model': {'name': 'nfnet_pico'}, 'data': {}})
  assert weights.options == {}
  spec = registry.get_model_spec('nfnet_pico')
  assert weights.preprocessing == spec.preprocessing


def test_every_option_of_a_run_is_loaded(old_pico):
  """Options that no list names, such as `alpha`, and settings of the future."""
  workdir, config = old_pico
  config['model'] |= {
    'activation': 'silu',
    'alpha': 0.3,
    'stochdepth_rate': 0.5,
    'dropout_rate': 0.5,
    'cross_replica_bn': False,
    'timm_forward': False,
    'skip_gain': None,
  }
  config['data'] |= {'eval_colour': 'grey'}
  weights = load_with(workdir, config)
  assert weights.options == {'activation': 'silu', 'alpha': 0.3}


def test_statistics_of_training_are_no_option_of_weights(tmp_path):
  _, weights = trained_weights.random_weights('bn_resnet_pico')
  trained_weights.write_run(tmp_path, weights)
  config = json.loads((tmp_path / 'config.json').read_text())
  config['model']['cross_replica_bn'] = True
  assert load_with(tmp_path, config).options == {}


def test_single_fields_are_restored(made, model):
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
    trees.assert_equal(fields['ema_params'], ema_of(3, model)[0])


def test_missing_fields_are_refused(made):
  with checkpoint.Checkpoints(
    made / 'checkpoints', read_only=True
  ) as checkpoints:
    with pytest.raises(checkpoint.UnreadableError, match='has no checkpoint 4'):
      checkpoints.restore_fields(['params'], step=4)
    with pytest.raises(checkpoint.UnreadableError, match='colour'):
      checkpoints.restore_fields(['colour'])
