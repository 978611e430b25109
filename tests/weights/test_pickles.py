"""Pickles of arrays are read; others are refused, and nothing is executed."""

import base64
import collections
import functools
import json
import os
import pathlib
import pickle
import tracemalloc

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from nfnet_jax.weights import pickles
from tests.weights.opcodes import (
  array_of,
  DTYPE,
  HEAD,
  in_bytes,
  name,
  refused,
  text,
)

ROOT = pathlib.Path(__file__).parents[2]
DILL = json.loads((ROOT / 'tests' / 'golden' / 'dill_pickles.json').read_text())
PROTOCOLS = (2, 3, 4, 5)


def tree():
  return {
    'NFNet/~/linear': {
      'b': np.arange(3, dtype=np.float32),
      'w': np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    },
    'NFNet/~/nf_block': {'skip_gain': np.array(0.5, np.float32)},
  }


def assert_equal(ours, theirs):
  assert type(ours) is type(theirs)
  if isinstance(ours, dict):
    assert list(ours) == list(theirs)
    for key in ours:
      assert_equal(ours[key], theirs[key])
  elif isinstance(ours, list):
    for one, other in zip(ours, theirs, strict=True):
      assert_equal(one, other)
  elif isinstance(ours, np.ndarray):
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    np.testing.assert_array_equal(ours, theirs)
  else:
    assert ours == theirs


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_published_format(protocol):
  assert_equal(pickles.read_pickle(pickle.dumps(tree(), protocol)), tree())


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_written_with_dill(protocol):
  data = base64.b64decode(DILL[str(protocol)])
  assert b'dill' in data
  assert_equal(pickles.read_pickle(data), tree())


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_names_of_numpy_1(protocol):
  data = pickle.dumps(tree(), protocol)
  if protocol >= 4:
    data = data[:2] + data[11:]  # The frame's length would be wrong.
  for length in (len('numpy._core.multiarray'), len('numpy._core.numeric')):
    data = data.replace(
      b'\x8c%cnumpy._core' % length, b'\x8c%cnumpy.core' % (length - 1)
    )
  data = data.replace(b'cnumpy._core', b'cnumpy.core')
  assert b'_core' not in data
  assert b'numpy.core' in data
  assert_equal(pickles.read_pickle(data), tree())


@pytest.mark.parametrize('protocol', PROTOCOLS)
@pytest.mark.parametrize(
  'array',
  [
    np.arange(6, dtype='>f4').reshape(2, 3),
    np.arange(24, dtype='>i2').reshape(2, 3, 4, order='F'),
    np.array(3, np.int64),
    np.zeros((0, 4), np.float32),
    np.array([True, False]),
    np.float16([1, -2]),
    np.float64([np.nan, -0.0, np.inf]),
    np.arange(24, dtype=np.float32).reshape(2, 3, 4)[:, ::2],
    np.moveaxis(np.arange(24, dtype=np.float32).reshape(2, 3, 4), 0, 1),
    np.arange(3, dtype=np.uint8),
  ],
  ids=lambda array: f'{array.dtype.str}{list(array.shape)}',
)
def test_arrays_of_all_kinds(protocol, array):
  assert_equal(pickles.read_pickle(pickle.dumps(array, protocol)), array)


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_containers_and_scalars(protocol):
  shared = np.ones(2, np.float32)
  value = {
    'list': [1, -1, 2**40, 1.5, 'é', b'\x00\xff', b'', None, True, False],
    'tuple': (1, (2, ()), (3, 4), (5, 6, 7), (8, 9, 10, 11)),
    'shared': [shared, shared],
    'scalar': np.float32(2.5),
    'ordered': collections.OrderedDict(b=shared, a=1),
  }
  read = pickles.read_pickle(pickle.dumps(value, protocol))
  assert read['list'] == value['list']
  assert read['tuple'] == value['tuple']
  assert_equal(read['scalar'], np.array(2.5, np.float32))
  assert_equal(read['ordered'], {'b': shared, 'a': 1})
  assert_equal(read['shared'][1], shared)


def test_buffers_of_protocol_5_in_band():
  read_only = np.arange(3, dtype=np.float32)
  read_only.setflags(write=False)
  for array in (read_only, read_only.copy()):
    data = pickle.dumps({'w': array}, 5)
    assert (b'\x96' in data) == array.flags.writeable  # BYTEARRAY8.
    assert_equal(pickles.read_pickle(data), {'w': array})
  apart = pickle.dumps({'w': array}, 5, buffer_callback=lambda buffer: None)
  refused(apart, 'NEXT_BUFFER')


@pytest.mark.parametrize('protocol', [3, 4, 5])
def test_arrays_are_views_of_the_pickle(protocol):
  arrays = [np.full(1 << 18, number, '>f4') for number in range(16)]
  data = pickle.dumps(arrays, protocol)
  tracemalloc.start()
  read = pickles.read_pickle(data)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < len(data) / 4
  assert_equal(read, arrays)


class Calls:
  """Is pickled as a function call."""

  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize('protocol', PROTOCOLS)
@pytest.mark.parametrize(
  ('function', 'argument', 'named'),
  [
    (os.system, 'touch {}', 'system'),
    (eval, "open('{}', 'w')", 'eval'),
    (exec, "open('{}', 'w')", 'exec'),
    (functools.partial, print, 'partial|print'),
    (np.load, '{}', 'numpy.*load'),
    (np.fromfile, '{}', 'fromfile'),
    (os.mkdir, '{}', 'mkdir'),
    (getattr, 'x', 'getattr'),
    (bytearray, 1 << 40, 'bytearray'),
  ],
  ids=lambda value: getattr(value, '__name__', None),
)
def test_foreign_calls_are_named_and_not_executed(
  tmp_path, protocol, function, argument, named
):
  touched = tmp_path / 'touched'
  if isinstance(argument, str):
    argument = argument.format(touched)
  data = pickle.dumps({**tree(), 'x': Calls(function, argument)}, protocol)
  refused(data, named)
  assert not touched.exists()


@pytest.mark.parametrize(
  ('module', 'attribute'),
  [
    ('jax._src.array', '_reconstruct_array'),
    ('haiku._src.data_structures', 'FlatMapping'),
    ('builtins', 'bytes'),
    ('numpy.core.multiarray', 'frombuffer'),
    ('numpy', 'ndarray.tofile'),
    ('nfnet_jax.weights.pickles', '_Array'),
    ('dill._dill', '_create_type'),
    ('_codecs', 'decode'),
    ('', ''),
  ],
)
def test_foreign_names_are_named(module, attribute):
  data = HEAD + name(module, attribute) + b'.'
  assert f'{module}.{attribute}' in refused(data, 'no array; it was not loaded')


def test_names_cannot_break_the_line():
  refused(HEAD + name('os\nfine', 'a\x1b[2J') + b'.', r'os\\nfine\.a\\x1b')


def test_what_arrays_do_not_need_is_refused():
  refused(pickle.dumps(np.array([{}, None])), "dtype 'O8'")
  refused(pickle.dumps(np.zeros(2, 'U3')), 'dtype')
  refused(pickle.dumps(np.zeros(2, 'f4,i4')), 'dtype')
  refused(pickle.dumps(np.zeros(2, 'M8[s]')), 'dtype')
  refused(pickle.dumps(np.zeros(2, np.complex64)), "dtype 'c8'")
  refused(pickle.dumps({'a': {1}}), 'EMPTY_SET')
  refused(pickle.dumps(tree(), 0), 'which arrays do not need')
  refused(pickle.dumps({1: 2}), 'key of type int')


@pytest.mark.parametrize('code', ['i,i', 'f4,', 'f', 'V4', 'O', '', 'f3', '4'])
def test_invalid_dtypes_are_refused(code):
  dtype = name('numpy', 'dtype') + text(code) + b'\x89\x88\x87R'
  refused(HEAD + array_of(in_bytes(b'1234'), b'K\x01\x85', dtype) + b'.')


def test_structured_dtype_by_its_state():
  fields = b'(K\x03' + text('<') + b'N' + text('a') + b'\x85}K\x04K\x01K\x00tb'
  raw = array_of(in_bytes(b'1234'), b'K\x01\x85', DTYPE + fields)
  refused(HEAD + raw + b'.', 'structured')


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_truncated_anywhere(protocol):
  data = pickle.dumps(tree(), protocol)
  for length in range(len(data)):
    refused(data[:length])


VALID = [pickle.dumps(tree(), protocol) for protocol in PROTOCOLS]


@hypothesis.given(
  st.sampled_from(VALID),
  st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=4)), max_size=4),
)
@hypothesis.settings(max_examples=500, deadline=None)
def test_flipped_bytes_raise_nothing_else(data, edits):
  damaged = bytearray(data)
  for position, replacement in edits:
    start = position % len(damaged)
    damaged[start : start + len(replacement)] = replacement
  only_arrays(bytes(damaged))


@hypothesis.given(st.binary(max_size=200))
@hypothesis.settings(max_examples=500, deadline=None)
def test_noise_raises_nothing_else(noise):
  only_arrays(HEAD + noise)


def only_arrays(data):
  try:
    values = [pickles.read_pickle(data)]
  except pickles.PickleError:
    return
  plain = (str, bytes, bytearray, int, float, bool, type(None), np.ndarray)
  while values:
    value = values.pop()
    if isinstance(value, (dict, list, tuple)):
      values += value.values() if isinstance(value, dict) else value
    else:
      assert type(value) in plain, type(value)
