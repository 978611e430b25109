"""Kinds of weights are detected; errors take one line."""

import hashlib
import io
import os
import pickle
import re

from etils import epath
import jax
import numpy as np
import pytest

import nfnet_jax
from nfnet_jax import preprocessing
from nfnet_jax.models import registry
from nfnet_jax.weights import arrays, download, network, timm
from tests.weights import trees


@pytest.fixture(scope='module')
def pico():
  return trees.filled()[0]


def to_file(path, write, *args):
  write(epath.Path(path), *args)
  return path.read_bytes()


@pytest.fixture(scope='module')
def contents(pico, tmp_path_factory):
  """Return the bytes of a file of each kind, all of the same weights."""
  path = tmp_path_factory.mktemp('contents') / 'file'
  theirs = timm.to_timm(pico, (1, 1, 1, 1))
  flat = trees.flat(pico)
  compressed = io.BytesIO()
  np.savez_compressed(compressed, **flat)
  bare = {name.removeprefix('params/'): array for name, array in flat.items()}
  return {
    'pickle': pickle.dumps(pico, 4),
    'npz': to_file(path, arrays.write_npz, flat, {}),
    'safetensors': to_file(path, arrays.write_safetensors, flat, {}),
    'npz of numpy': compressed.getvalue(),
    'bare npz': to_file(path, arrays.write_npz, bare, {}),
    'timm': to_file(path, arrays.write_safetensors, theirs, {}),
    'timm as npz': to_file(path, arrays.write_npz, theirs, {}),
  }


KINDS = (
  'pickle',
  'npz',
  'safetensors',
  'npz of numpy',
  'bare npz',
  'timm',
  'timm as npz',
)


def assert_refused(path, match=None):
  """Check that loading fails, and return the message of one line."""
  with pytest.raises(network.WeightsError, match=match) as info:
    nfnet_jax.load_weights(path)
  assert '\n' not in str(info.value)
  assert f"'{path}'" in str(info.value)
  assert not str(info.value).endswith('..')
  return str(info.value)


@pytest.mark.parametrize(
  ('kind', 'ending'),
  [
    *((kind, '.pkl') for kind in KINDS),
    ('npz', ''),
    *(
      pytest.param(kind, ending, marks=pytest.mark.slow)
      for kind in KINDS
      for ending in ('.npz', '.safetensors', '')
      if (kind, ending) != ('npz', '')
    ),
  ],
)
def test_kinds_are_detected_by_contents(tmp_path, pico, contents, kind, ending):
  path = tmp_path / f'weights{ending}'
  path.write_bytes(contents[kind])
  weights = nfnet_jax.load_weights(os.fspath(path) if ending else path)
  trees.assert_equal(weights.params, pico)
  assert weights.model_state == {}
  assert (weights.model, weights.num_classes) == ('nfnet_pico', 10)
  assert weights.preprocessing == preprocessing.EvalPreprocessing(
    32, 'squash', 32
  )
  assert weights.class_names[:2] == ('class 0', 'class 1')
  assert weights.options == {}


def test_weights_fit_in_their_model(tmp_path, contents):
  (tmp_path / 'a').write_bytes(contents['pickle'])
  weights = nfnet_jax.load_weights(tmp_path / 'a')
  images = np.ones((2, 32, 32, 3), np.float32)
  logits, _ = jax.eval_shape(
    lambda *trees: weights.create().apply(*trees, None, images, False),
    weights.params,
    weights.model_state,
  )
  assert logits.shape == (2, 10)


def test_floats_become_float32(tmp_path, pico):
  halves = {
    path: {name: array.astype('>f2') for name, array in leaves.items()}
    for path, leaves in pico.items()
  }
  (tmp_path / 'a').write_bytes(pickle.dumps(halves))
  weights = nfnet_jax.load_weights(tmp_path / 'a')
  expected = {
    path: {name: array.astype(np.float32) for name, array in leaves.items()}
    for path, leaves in halves.items()
  }
  trees.assert_equal(weights.params, expected)


def test_state_keeps_its_dtypes_in_native_byte_order(tmp_path):
  params, state = trees.filled('bn_resnet_pico')
  flat = trees.flat(params, state)
  swapped = {
    name: a.astype(a.dtype.newbyteorder('>')) for name, a in flat.items()
  }
  np.savez(tmp_path / 'a.npz', **swapped)
  weights = nfnet_jax.load_weights(tmp_path / 'a.npz')
  assert weights.model == 'bn_resnet_pico'
  trees.assert_equal(weights.params, params)
  trees.assert_equal(weights.model_state, state)


@pytest.mark.parametrize('published', [True, False])
def test_md5_of_published_files(tmp_path, monkeypatch, caplog, published):
  data = pickle.dumps(trees.filled(num_classes=1000)[0])
  md5 = hashlib.md5(data).hexdigest() if published else 32 * '0'
  monkeypatch.setitem(download.PUBLISHED_MD5, 'nfnet_pico', md5)
  (tmp_path / 'F0_haiku.npz').write_bytes(data)
  weights = nfnet_jax.load_weights(tmp_path / 'F0_haiku.npz')
  assert weights.class_names[0] == 'tench'
  assert len(set(weights.class_names)) > 990
  if published:
    assert not caplog.text
  else:
    assert f'published nfnet_pico but md5 {hashlib.md5(data).hexdigest()}' in (
      caplog.text
    )


def test_md5_of_other_files_is_not_compared(
  tmp_path, monkeypatch, caplog, contents
):
  monkeypatch.setitem(download.PUBLISHED_MD5, 'nfnet_pico', 32 * '0')
  for kind in ('pickle', 'npz'):  # Ten classes; no pickle.
    (tmp_path / 'a').write_bytes(contents[kind])
    nfnet_jax.load_weights(tmp_path / 'a')
  assert not caplog.text


def test_md5_table():
  assert list(download.PUBLISHED_MD5) == [f'nfnet_f{i}' for i in range(7)]
  md5 = download.PUBLISHED_MD5.values()
  assert all(re.fullmatch('[0-9a-f]{32}', value) for value in md5)
  assert (
    download.PUBLISHED_MD5['nfnet_f0'] == '0a41039da1cb43adf47f1b7d86ddfe0f'
  )
  assert (
    download.PUBLISHED_MD5['nfnet_f6'] == 'b16cca40ac1ecec2bd5e3273866da0c1'
  )


@pytest.mark.parametrize(
  ('data', 'match'),
  [
    (b'', 'begin neither like'),
    (b'hello', 'begin neither like'),
    (b'<html><head>', 'begin neither like'),
    (b'\x80', 'the pickle is damaged'),
    (b'PK', 'the .npz is damaged'),
    (b'PK\x05\x06' + bytes(18), 'fit no known model'),
    (b'\x02' + bytes(7) + b'{}', 'fit no known model'),
    (b'\x02' + bytes(7) + b'{', 'safetensors are damaged'),
    (pickle.dumps([1]), 'no mapping of mappings'),
    (pickle.dumps({}), 'fit no known model'),
    (pickle.dumps({'a': 1}), 'no mapping of mappings'),
    (pickle.dumps({'a': {'w': [1.0]}}), 'no mapping of mappings'),
    (pickle.dumps({'a': {'b': {'w': np.ones(2)}}}), 'no mapping of mappings'),
    (pickle.dumps({'a\nb/~/linear': {'w': np.ones((2, 2))}}), 'begin with'),
    (pickle.dumps({'a': {'w': io.BytesIO()}}), '_io.BytesIO'),
  ],
)
def test_files_without_weights(tmp_path, data, match):
  (tmp_path / 'weights.npz').write_bytes(data)
  assert_refused(tmp_path / 'weights.npz', match)


@pytest.mark.parametrize('kind', KINDS)
def test_truncated(tmp_path, contents, kind):
  (tmp_path / 'a').write_bytes(contents[kind][: len(contents[kind]) // 2])
  assert_refused(tmp_path / 'a', 'damaged')


def test_no_such_file(tmp_path):
  assert_refused(tmp_path / 'F9_haiku.npz', 'There are no weights')
  assert_refused(tmp_path / 'no' / 'folder', 'There are no weights')


METADATA = {
  'model': 'nfnet_pico',
  'options': {'alpha': 0.25, 'activation': 'silu'},
  'class_names': list('abcdefghij'),
  'size': 40,
  'crop': 'centre',
  'margin': 0,
}


def write_npz(tmp_path, pico, metadata):
  path = epath.Path(tmp_path) / 'weights.npz'
  arrays.write_npz(path, trees.flat(pico), metadata)
  return path


def test_metadata_are_read(tmp_path, pico):
  weights = nfnet_jax.load_weights(write_npz(tmp_path, pico, METADATA))
  assert weights.metadata() == {**METADATA, 'num_classes': 10}


def test_missing_metadata_have_their_defaults(tmp_path, pico):
  metadata = {
    'model': 'nfnet_pico',
    'options': {'activation': 'gelu'},
    'new': 1,
  }
  weights = nfnet_jax.load_weights(write_npz(tmp_path, pico, metadata))
  assert weights.options == {}  # GELU is the model's own.
  spec = registry.get_model_spec('nfnet_pico')
  assert weights.preprocessing == spec.preprocessing


def test_options_without_a_model_are_ignored(tmp_path, pico):
  path = write_npz(tmp_path, pico, {'options': {'alpha': 0.25}})
  assert nfnet_jax.load_weights(path).options == {}


@pytest.mark.parametrize(
  'wrong',
  [
    {'model': 3},
    {'model': ['nfnet_pico']},
    {'model': 'nfnet_pica'},
    {'model': 'nfnet_nano'},
    {'options': 'x'},
    {'options': [1]},
    {'options': {'colour': 1}},
    {'options': {'num_classes': 3}},
    {'options': {'name': 'Other'}},
    {'options': {'alpha': 'x'}},
    {'options': {'activation': 3}},
    {'size': '32'},
    {'size': 0},
    {'size': True},
    {'crop': 'round'},
    {'crop': 3},
    {'crop': ['squash']},
    {'margin': 'x'},
    {'margin': -1},
    {'class_names': 3},
    {'class_names': 'abcdefghij'},
    {'class_names': [1] * 10},
    {'class_names': ['a', 'b']},
  ],
  ids=str,
)
def test_wrong_metadata(tmp_path, pico, wrong):
  message = assert_refused(write_npz(tmp_path, pico, {**METADATA, **wrong}))
  (value,) = wrong.values()
  if not isinstance(value, dict) and len(str(value)) < 13:
    assert str(value).strip('[]') in message or 'names' in message
