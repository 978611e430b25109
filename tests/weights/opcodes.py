"""Pickles that are built opcode by opcode."""

import struct

import pytest

from nfnet_jax.weights import pickles

HEAD = b'\x80\x04'


def text(string):
  return b'X' + struct.pack('<I', len(string)) + string.encode()


def name(module, attribute):
  return text(module) + text(attribute) + b'\x93'


def integer(value):
  size = value.bit_length() // 8 + 1
  return b'\x8a' + bytes([size]) + value.to_bytes(size, 'little', signed=True)


DTYPE = name('numpy', 'dtype') + text('f4') + b'\x89\x88\x87R'


def array_of(raw, shape, dtype=DTYPE, order=b'\x89'):
  """Return the opcodes of an array with any state."""
  made = name('numpy.core.multiarray', '_reconstruct')
  made += name('numpy', 'ndarray') + b'K\x00\x85' + text('b') + b'\x87R'
  return made + b'(K\x01' + shape + dtype + order + raw + b'tb'


def in_bytes(raw):
  return b'B' + struct.pack('<I', len(raw)) + raw


def refused(data, match=None):
  with pytest.raises(pickles.PickleError, match=match) as info:
    pickles.read_pickle(data)
  assert '\n' not in str(info.value)
  return str(info.value)
