"""Weights are written exactly, atomically, and for other programs."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest

import nfnet_jax
from nfnet_jax import preprocessing
from nfnet_jax.storage import files
from nfnet_jax.weights import network
from tests.weights import trees

FORMATS = [
  ('.npz', 'haiku'),
  pytest.param('.safetensors', 'haiku', marks=pytest.mark.slow),
  pytest.param('.npz', 'timm', marks=pytest.mark.slow),
  ('.safetensors', 'timm'),
]


def weights_of(name, **changes):
  params, state = trees.filled(name)
  return network.Weights(
    **{
      'params': params,
      'model_state': state,
      'model': name,
      'num_classes': 10,
      'options': {},
      'class_names': tuple('abcdefghiß'),
      'preprocessing': preprocessing.EvalPreprocessing(48, 'centre', 3),
      **changes,
    }
  )


@pytest.fixture(scope='module')
def pico():
  return weights_of('nfnet_pico', options={'alpha': 0.3, 'activation': 'silu'})


def assert_equal(ours, theirs):
  trees.assert_equal(ours.params, theirs.params)
  trees.assert_equal(ours.model_state, theirs.model_state)
  assert ours.metadata() == theirs.metadata()
  for field in dataclasses.fields(network.Weights):
    ours_type = type(getattr(ours, field.name))
    assert ours_type is type(getattr(theirs, field.name)), field.name


@pytest.mark.parametrize(('ending', 'layout'), FORMATS)
def test_round_trips_are_exact(tmp_path, pico, ending, layout):
  path = tmp_path / f'a{ending}'
  nfnet_jax.save_weights(path, pico, layout)
  loaded = nfnet_jax.load_weights(path)
  assert_equal(loaded, pico)
  again = tmp_path / f'b{ending}'
  nfnet_jax.save_weights(str(again), loaded, layout)
  assert_equal(nfnet_jax.load_weights(again), pico)


@pytest.mark.slow
def test_stages_of_blocks_depend_on_the_variant(tmp_path):
  nano = weights_of('nfnet_nano')
  nfnet_jax.save_weights(tmp_path / 'a.npz', nano, 'timm')
  with np.load(tmp_path / 'a.npz') as file:
    gains = {name for name in file.files if name.endswith('skipinit_gain')}
  places = ('0.0', '1.0', '2.0', '2.1', '2.2', '3.0')
  assert gains == {f'stages.{place}.skipinit_gain' for place in places}
  assert_equal(nfnet_jax.load_weights(tmp_path / 'a.npz'), nano)


@pytest.mark.parametrize(
  ('name', 'ending'),
  [
    ('bn_resnet_pico', '.npz'),
    ('nfnet_pico_bn', '.safetensors'),
    pytest.param('bn_resnet_pico', '.safetensors', marks=pytest.mark.slow),
    pytest.param('nfnet_pico_bn', '.npz', marks=pytest.mark.slow),
  ],
)
def test_running_statistics_are_kept_with_their_dtypes(tmp_path, ending, name):
  weights = weights_of(name)
  assert weights.model_state
  path = tmp_path / f'a{ending}'
  nfnet_jax.save_weights(path, weights)
  assert_equal(nfnet_jax.load_weights(path), weights)


def test_jax_arrays_can_be_saved(tmp_path, pico, pico_params):
  changed = dataclasses.replace(pico, params=pico_params)
  nfnet_jax.save_weights(tmp_path / 'a.npz', changed)
  loaded = nfnet_jax.load_weights(tmp_path / 'a.npz')
  for path, leaves in pico_params.items():
    for name, array in leaves.items():
      np.testing.assert_array_equal(loaded.params[path][name], array)


def test_npz_is_read_by_numpy(tmp_path, pico):
  nfnet_jax.save_weights(tmp_path / 'a.npz', pico)
  with np.load(tmp_path / 'a.npz', allow_pickle=False) as file:
    expected = trees.flat(pico.params)
    assert set(file.files) == {*expected, 'nfnet_jax'}
    for name, array in expected.items():
      np.testing.assert_array_equal(file[name], array)
    metadata = json.loads(str(file['nfnet_jax']))
  assert metadata['model'] == 'nfnet_pico'
  assert metadata['class_names'][-1] == 'ß'


def test_safetensors_are_read_by_safetensors(tmp_path, pico):
  import safetensors

  nfnet_jax.save_weights(tmp_path / 'a.safetensors', pico, 'timm')
  with safetensors.safe_open(tmp_path / 'a.safetensors', 'numpy') as file:
    assert file.get_tensor('head.fc.weight').shape == (10, 192)
    np.testing.assert_array_equal(
      file.get_tensor('head.fc.weight'),
      pico.params['NFNet/~/linear']['w'].T,
    )
    assert json.loads(file.metadata()['nfnet_jax'])['size'] == 48


@pytest.mark.parametrize(
  ('name', 'layout', 'match'),
  [
    ('a.pkl', 'haiku', r"a.pkl' must end in .npz or .safetensors"),
    ('a', 'haiku', 'must end in'),
    ('a.npz.gz', 'haiku', 'must end in'),
    ('a.npz', 'flax', "Unknown layout 'flax'; known: haiku, timm"),
    ('a.npz', '', 'Unknown layout'),
  ],
)
def test_unknown_endings_and_layouts(tmp_path, pico, name, layout, match):
  with pytest.raises(ValueError, match=match):
    nfnet_jax.save_weights(tmp_path / name, pico, layout)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['bn_resnet_pico', 'nfnet_pico_bn'])
def test_families_that_timm_lays_out_differently(tmp_path, name):
  with pytest.raises(ValueError, match=f"of NFNets; '{name}' has none"):
    nfnet_jax.save_weights(tmp_path / 'a.npz', weights_of(name), 'timm')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('ending', 'old'),
  [
    ('.npz', b'the old file'),
    ('.safetensors', None),
    pytest.param('.npz', None, marks=pytest.mark.slow),
    pytest.param('.safetensors', b'the old file', marks=pytest.mark.slow),
  ],
)
def test_a_write_that_is_interrupted(tmp_path, monkeypatch, pico, ending, old):
  path = tmp_path / f'a{ending}'
  if old is not None:
    path.write_bytes(old)

  @contextlib.contextmanager
  def stop_before_renaming(target):
    with atomically(target) as temporary:
      yield temporary
      assert temporary.stat().length
      raise KeyboardInterrupt

  atomically = files.atomically
  monkeypatch.setattr(files, 'atomically', stop_before_renaming)
  with pytest.raises(KeyboardInterrupt):
    nfnet_jax.save_weights(path, pico)
  assert (path.read_bytes() if path.exists() else None) == old
  monkeypatch.undo()
  nfnet_jax.save_weights(path, pico)
  assert_equal(nfnet_jax.load_weights(path), pico)
  assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_does_not_exist(tmp_path, pico):
  with pytest.raises(OSError, match='missing'):
    nfnet_jax.save_weights(tmp_path / 'missing' / 'a.npz', pico)
