"""Malicious pickles are refused, with little memory."""

import pathlib
import struct
import subprocess
import sys
import tracemalloc

import pytest

from nfnet_jax.weights import pickles
from tests.weights.opcodes import (
  array_of,
  DTYPE,
  HEAD,
  in_bytes,
  integer,
  name,
  refused,
  text,
)

ROOT = pathlib.Path(__file__).parents[2]

# A tuple of twice a tuple of twice a tuple ...
EXPONENTIAL = b'K\x01\x94' + b''.join(b'h%c\x86\x94' % i for i in range(100))


def vector(shape):
  made = (
    name('numpy.core.numeric', '_frombuffer') + b'(' + in_bytes(bytes(1 << 14))
  )
  return made + DTYPE + shape + text('C') + b'tR'


ATTACKS = {
  'BINBYTES8': b'\x8e' + struct.pack('<Q', 1 << 50),
  'BINBYTES8 of 64 bits': b'\x8e' + struct.pack('<Q', (1 << 64) - 1),
  'BINBYTES': b'B\xff\xff\xff\xff',
  'BINUNICODE': b'X\xff\xff\xff\xff',
  'BINUNICODE8': b'\x8d' + struct.pack('<Q', 1 << 50),
  'BYTEARRAY8': b'\x96' + struct.pack('<Q', 1 << 50),
  'BYTEARRAY8 that would fit': b'\x96' + struct.pack('<Q', 1 << 30),
  'FRAME': b'\x95' + struct.pack('<Q', 1 << 50),
  'FRAME of 64 bits': b'\x95' + struct.pack('<Q', (1 << 64) - 1),
  'LONG4': b'\x8b\xff\xff\xff\x7f',
  'shape': array_of(in_bytes(b'1234'), integer(1 << 50) + b'\x85'),
  'shape that wraps': array_of(
    in_bytes(b''), integer(1 << 62) + integer(4) + b'\x86'
  ),
  'shape of many axes': array_of(
    in_bytes(b'1234'), b'(' + b'K\x01' * 100_000 + b't'
  ),
  'shape of a negative': array_of(
    in_bytes(b'12341234'), integer(-1) + integer(-2) + b'\x86'
  ),
  'shape of floats': array_of(in_bytes(b'1234'), b'G' + b'\x3f\xf0' + bytes(6)),
  'shape that is too small': array_of(in_bytes(b'12341234'), b'K\x01\x85'),
  'text as bytes': array_of(text('1234'), b'K\x01\x85'),
  'shape of arrays': array_of(
    in_bytes(b''),
    vector(integer(4096) + b'K\x01\x86') + vector(b'M\x00\x10\x85') + b'\x86',
  ),
  'shape of text': array_of(in_bytes(b''), text('a')),
  'no contents': name('numpy', 'ndarray') + b')R',
  'bytes by number': name('__builtin__', 'bytes') + integer(1 << 50) + b'\x85R',
  'state of a scalar': name('numpy.core.multiarray', 'scalar')
  + DTYPE
  + in_bytes(b'1234')
  + b'\x86R(K\x01K\x04\x85NNNtb',
  'deep key': b'}' + b')' + b'\x85' * 200_000 + b'Ns',
  'deep keys': b'}(' + b')' + b'\x85' * 200_000 + b'Nu',
  'deep key of a mapping': name('collections', 'OrderedDict')
  + b'](]('
  + b')'
  + b'\x85' * 200_000
  + b'Nee\x85R',
  'deep list': b']' * 100_000 + b'a' * 99_999,
  'list of itself': b']\x94h\x00a',
  'mapping of itself': b'}\x94' + text('a') + b'h\x00s',
  'exponential': EXPONENTIAL,
  'exponential lists': b'(]\x94'
  + b''.join(b'](h%ch%ce\x94' % (i, i) for i in range(100))
  + b't',
  'exponential encoding': name('_codecs', 'encode')
  + text('a')
  + EXPONENTIAL
  + b'\x86R',
  'exponential size': array_of(in_bytes(b''), EXPONENTIAL + b'\x85'),
  'exponential dtype': name('numpy', 'dtype') + EXPONENTIAL + b'\x85R',
  'exponential name': text('numpy') + EXPONENTIAL + b'\x93',
  'repeated bytes': b'('
  + in_bytes(bytes(10_000))
  + b'\x94'
  + b'h\x00' * 10_000
  + b't',
  'two values': b'NN',
  'repeated text': text('a' * 10_000)
  + b'\x94'
  + text('latin1')
  + b'\x94'
  + name('_codecs', 'encode')
  + b'\x94]('
  + b'h\x02h\x00h\x01\x86R' * 10_000
  + b'e',
  'encoding': name('_codecs', 'encode') + text('a') + text('zip') + b'\x86R',
  'call of a result': name('numpy', 'dtype') + text('f4') + b'\x85R)R',
  'only a dtype': DTYPE,
  'only a function': name('numpy', 'dtype'),
  'call of text': text('f4') + b')R',
  'build on a function': name('numpy', 'dtype')
  + b'}'
  + text('function')
  + b'Nsb',
}


@pytest.mark.parametrize(
  'attack',
  [
    pytest.param(name, marks=pytest.mark.slow) if 'deep' in name else name
    for name in ATTACKS
  ],
)
def test_attacks_are_refused_with_little_memory(attack):
  data = HEAD + ATTACKS[attack] + b'.'
  tracemalloc.start()
  try:
    refused(data)
    assert tracemalloc.get_traced_memory()[1] < 50 * len(data) + (1 << 20)
  finally:
    tracemalloc.stop()


def test_attacks_stay_within_a_limited_address_space(tmp_path):
  """tracemalloc may not see what C allocates; the system does."""
  for number, attack in enumerate(ATTACKS.values()):
    (tmp_path / f'{number}.pkl').write_bytes(HEAD + attack + b'.')
  program = (
    'import pathlib, resource, sys\n'
    'from nfnet_jax.weights import pickles\n'
    'used = int(open("/proc/self/statm").read().split()[0]) * 4096\n'
    'resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29),) * 2)\n'
    'for path in pathlib.Path(sys.argv[1]).iterdir():\n'
    '  data = path.read_bytes()\n'
    '  try: pickles.read_pickle(data)\n'
    '  except pickles.PickleError as error:\n'
    '    assert not isinstance(error.__cause__, MemoryError), path\n'
    '  else: raise AssertionError(path)\n'
    'print("held")'
  )
  run = subprocess.run(
    [sys.executable, '-c', program, str(tmp_path)],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert run.stdout == 'held\n', run.stderr


@pytest.mark.parametrize('size', [0, 1, 3, 1 << 50])
def test_shapes_and_bytes_that_disagree(size):
  data = array_of(in_bytes(b'12341234'), integer(size) + b'\x85')
  message = rf'declares {4 * size:,} bytes and has 8$'
  refused(HEAD + data + b'.', message)


@pytest.mark.parametrize('index', [b'\xff\xff\xff\xff', b'\x00\x00\x00\x7f'])
def test_a_large_index_allocates_nothing(index):
  tracemalloc.start()
  assert pickles.read_pickle(HEAD + b']r' + index + b'.') == []
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 1 << 20
