"""Flat files of arrays are read and written; damaged ones are refused."""

import io
import json
import struct
import tracemalloc

from etils import epath
import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from nfnet_jax.weights import arrays
from tests.weights import trees

F32 = {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}
EXAMPLES = {
  'a/~/w': np.arange(6, dtype=np.float32).reshape(2, 3),
  'scalar': np.array(2.5, np.float32),
  'none': np.zeros((0, 3), np.float32),
  'fortran': np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
  'strided': np.arange(8, dtype=np.float32)[::2],
  'counter': np.array(3, np.int32),
  'flags': np.array([True, False]),
  'half': np.float16([1, -2]),
  'nan': np.float64([np.nan, -0.0, np.inf]),
}
METADATA = {
  'model': 'é',
  'size': 3,
  'options': {'alpha': 0.25},
  'class_names': [],
}


def read_npz(data):
  return arrays.read_npz(io.BytesIO(data))


def refused(read, data, match=None):
  tracemalloc.start()
  try:
    with pytest.raises(arrays.DamagedError, match=match):
      read(data)
    assert tracemalloc.get_traced_memory()[1] < 100 * len(data) + (4 << 20)
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize(
  ('write', 'read'),
  [
    (arrays.write_npz, lambda path: read_npz(path.read_bytes())),
    (
      arrays.write_safetensors,
      lambda path: arrays.read_safetensors(path.read_bytes()),
    ),
  ],
)
def test_round_trips_are_exact(tmp_path, write, read):
  path = epath.Path(tmp_path) / 'file'
  write(path, EXAMPLES, METADATA)
  ours, metadata = read(path)
  assert metadata == METADATA
  assert type(metadata['size']) is int
  trees.assert_equal({'': ours}, {'': EXAMPLES})


@pytest.mark.parametrize('write', [np.savez, np.savez_compressed])
def test_npz_of_numpy(write):
  file = io.BytesIO()
  write(file, **EXAMPLES, big=np.arange(3, dtype='>f4'))
  ours, metadata = read_npz(file.getvalue())
  assert metadata == {}
  np.testing.assert_array_equal(ours.pop('big'), [0, 1, 2])
  trees.assert_equal({'': ours}, {'': EXAMPLES})


def test_npz_headers_of_version_2():
  member = trees.npy_header('<f4', (1,), b'\0\0\x80?', b'\x02\x00')
  ours, _ = read_npz(trees.archive([('a.npy', member)]))
  np.testing.assert_array_equal(ours['a'], np.ones(1, np.float32))


MEMBERS = {
  'version 3': (trees.npy_header('<f4', (1,), b'1234', b'\x03\x00'), 'version'),
  'no array': (b'hello, I am text', "'a.npy' is not an array"),
  'empty': (b'', "'a.npy' is not an array"),
  'more than it has': (
    trees.npy_header('<f4', (1 << 40,), b'1234'),
    "'a.npy' declares an array float32",
  ),
  'more by wrapping': (
    trees.npy_header('<f4', (1 << 62, 4), b'1234'),
    "'a.npy' declares",
  ),
  'a little more': (trees.npy_header('<f4', (9,), b'1234'), "'a.npy'"),
  'negative': (trees.npy_header('<f4', (-1,), b'1234'), "'a.npy'"),
  'an axis beyond integers': (trees.npy_header('<f4', (0, 1 << 70)), None),
  'a float for an axis': (trees.npy_header('<f4', (1.0,), b'1234'), "'a.npy'"),
  'objects': (trees.npy(np.array([{}, None])), 'dtype object; it was not'),
  'structured': (trees.npy(np.zeros(2, 'f4,i4')), 'dtype'),
  'subarrays': (trees.npy_header('(1000000000,)f4', (9,)), 'dtype'),
  'text': (trees.npy(np.array(['1.0'])), 'dtype <U3'),
  'text of nothing': (trees.npy_header('<U0', (1 << 40,)), 'dtype <U0'),
  'complex': (trees.npy(np.zeros(2, np.complex64)), 'dtype complex64'),
  'times': (trees.npy(np.zeros(2, 'M8[s]')), 'dtype'),
  'unhashable header': (trees.npy_raw(b'{[]: 1}'), None),
  'endless header': (trees.npy_raw(b'-' * 5000 + b'1'), None),
  'brackets in the header': (trees.npy_raw(b'(' * 5000 + b'1'), None),
  'gigantic header': (b'\x93NUMPY\x02\x00\xff\xff\xff\x7f{', "'a.npy'"),
  'code in the header': (
    trees.npy_raw(b"__import__('os').mkdir('harm')"),
    "'a.npy'",
  ),
}


@pytest.mark.parametrize('member', MEMBERS)
def test_members_of_an_npz_that_are_refused(member):
  content, match = MEMBERS[member]
  refused(read_npz, trees.archive([('a.npy', content)]), match)


def test_zip_bombs():
  member = trees.npy(np.zeros(1 << 20, np.uint8))
  data = bytearray(trees.archive([('a.npy', member)]))
  assert len(data) < 2000
  refused(read_npz, declaring(data, (1 << 32) - 2), 'declares 4,294,967,294')
  # Many small members add up to a large one.
  many = trees.archive([(f'{i}.npy', member) for i in range(30)])
  assert read_npz(many)[0].keys() == {str(i) for i in range(30)}
  many = declaring(bytearray(many), 1 << 26)
  refused(read_npz, many, f'declares {30 << 26:,} bytes')


def declaring(data, size):
  """Set the unpacked size of each entry of the central directory."""
  position = data.find(b'PK\x01\x02')
  while position >= 0:
    data[position + 24 : position + 28] = struct.pack('<I', size)
    position = data.find(b'PK\x01\x02', position + 1)
  return bytes(data)


def test_an_array_that_compresses_well_is_read(tmp_path):
  np.savez_compressed(tmp_path / 'a.npz', w=np.zeros(1 << 24, np.float32))
  ours, _ = read_npz((tmp_path / 'a.npz').read_bytes())
  assert ours['w'].shape == (1 << 24,)


def test_encrypted():
  data = trees.archive([('a.npy', trees.npy(np.ones(3)))])
  data = bytearray(data)
  data[6] |= 1
  data[data.find(b'PK\x01\x02') + 8] |= 1
  refused(read_npz, bytes(data), 'encrypted')


@pytest.mark.filterwarnings('ignore:Duplicate name')
@pytest.mark.parametrize('names', [('a.npy', 'a.npy'), ('a', 'a.npy')])
def test_the_same_name_twice(names):
  member = trees.npy(np.ones(3))
  data = trees.archive([(name, member) for name in names])
  refused(read_npz, data, "'a' more than once")


@pytest.mark.parametrize('folder', ['archive', 'model_best'])
def test_checkpoints_of_pytorch(folder):
  members = [(f'{folder}/data.pkl', b'\x80\x02}q\x00.'), (f'{folder}/v', b'3')]
  refused(read_npz, trees.archive(members), 'PyTorch.*safetensors')


@pytest.mark.parametrize(
  'text',
  ['{', '[]', '3', '', '[' * 100_000, '{"a": ' * 20_000, '{"a": 1} x'],
  ids=lambda text: text[:9],
)
def test_damaged_metadata(text):
  members = [('nfnet_jax.npy', trees.npy(np.asarray(text)))]
  refused(read_npz, trees.archive(members), 'metadata inside are damaged')
  header = {'__metadata__': {'nfnet_jax': text}, 'w': F32}
  data = trees.safetensors(header, b'1234')
  refused(arrays.read_safetensors, data, 'metadata inside are damaged')


def test_metadata_of_other_programs_are_ignored():
  header = {'__metadata__': {'format': 'pt'}, 'w': F32}
  _, metadata = arrays.read_safetensors(trees.safetensors(header, b'1234'))
  assert metadata == {}
  header['__metadata__'] = None
  _, metadata = arrays.read_safetensors(trees.safetensors(header, b'1234'))
  assert metadata == {}


TENSORS = {
  'truncated': (trees.safetensors({'w': F32}, b'12'), 'damaged'),
  'surplus bytes': (trees.safetensors({'w': F32}, b'12345'), 'damaged'),
  'overlapping': (trees.safetensors({'v': F32, 'w': F32}, b'1234'), 'damaged'),
  'gigantic': (
    trees.safetensors(
      {'w': {**F32, 'shape': [1 << 61], 'data_offsets': [0, 1 << 63]}}, b'1234'
    ),
    'damaged',
  ),
  'gigantic offsets': (
    trees.safetensors({'w': {**F32, 'data_offsets': [0, 1 << 62]}}, b'1234'),
    'damaged',
  ),
  'wrong shape': (
    trees.safetensors({'w': {**F32, 'shape': [2]}}, b'1234'),
    'damaged',
  ),
  'negative': (trees.safetensors({'w': {**F32, 'shape': [-1]}}), 'damaged'),
  'gigantic header': (struct.pack('<Q', 1 << 62) + b'{}', 'damaged'),
  'header beyond the end': (struct.pack('<Q', 999) + b'{}', 'damaged'),
  'header of no JSON': (trees.safetensors(b'{hello'), 'damaged'),
  'nested header': (trees.safetensors(b'{"a":' * 10_000), 'damaged'),
  'unknown dtype': (
    trees.safetensors({'w': {**F32, 'dtype': 'F33'}}, b'1234'),
    'damaged',
  ),
  'bfloat16': (
    trees.safetensors({'w': {**F32, 'dtype': 'BF16', 'shape': [2]}}, b'1234'),
    'BF16.*convert them to F32',
  ),
  'complex': (
    trees.safetensors(
      {'w': {'dtype': 'C64', 'shape': [1], 'data_offsets': [0, 8]}}, bytes(8)
    ),
    # Older versions of safetensors do not know this dtype.
    "'w' has the dtype complex64|are damaged",
  ),
}


@pytest.mark.parametrize('tensors', TENSORS)
def test_safetensors_that_are_refused(tensors):
  data, match = TENSORS[tensors]
  refused(arrays.read_safetensors, data, match)


def _written(tmp_path_factory, write):
  path = epath.Path(tmp_path_factory.mktemp('arrays')) / 'file'
  write(path, EXAMPLES, METADATA)
  return path.read_bytes()


@pytest.fixture(scope='module')
def npz(tmp_path_factory):
  return _written(tmp_path_factory, arrays.write_npz)


@pytest.fixture(scope='module')
def tensors(tmp_path_factory):
  return _written(tmp_path_factory, arrays.write_safetensors)


def test_truncated_anywhere(npz, tensors):
  for length in range(0, len(npz), 7):
    with pytest.raises(arrays.DamagedError):
      read_npz(npz[:length])
  for length in range(0, len(tensors), 3):
    with pytest.raises(arrays.DamagedError):
      arrays.read_safetensors(tensors[:length])


EDITS = st.lists(
  st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=4)),
  min_size=1,
  max_size=3,
)


@hypothesis.given(EDITS)
@hypothesis.settings(
  max_examples=300,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_flipped_bytes_raise_nothing_else(npz, tensors, edits):
  for read, data in ((read_npz, npz), (arrays.read_safetensors, tensors)):
    damaged = bytearray(data)
    for position, replacement in edits:
      start = position % len(damaged)
      damaged[start : start + len(replacement)] = replacement
    try:
      ours, metadata = read(bytes(damaged))
    except arrays.DamagedError:
      continue
    assert isinstance(metadata, dict)
    assert {array.dtype.kind for array in ours.values()} <= set('fiub')


def test_files_are_read_without_this_package(npz, tensors):
  with np.load(io.BytesIO(npz), allow_pickle=False) as file:
    np.testing.assert_array_equal(file['a/~/w'], EXAMPLES['a/~/w'])
    assert json.loads(str(file['nfnet_jax'])) == METADATA
  from safetensors import numpy as safetensors_numpy

  loaded = safetensors_numpy.load(tensors)
  assert loaded.keys() == EXAMPLES.keys()
  np.testing.assert_array_equal(loaded['fortran'], EXAMPLES['fortran'])
