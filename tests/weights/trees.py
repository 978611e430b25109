"""Trees of random weights, and files of arrays built byte by byte."""

import io
import json
import struct
import types
import zipfile

import numpy as np

from nfnet_jax.weights import identify

_trace = identify.abstract_trees
_traced = {}


def abstract(name, num_classes=10, options=types.MappingProxyType({})):
  """Return shapes of a model's parameters and state, traced once."""
  key = name, num_classes, repr(dict(options))
  if key not in _traced:
    _traced[key] = _trace(name, num_classes, options)
  return _traced[key]


def trace_once(monkeypatch):
  """Let weights be identified by shapes that earlier tests have traced."""
  monkeypatch.setattr(identify, 'abstract_trees', abstract)


def filled(name='nfnet_pico', num_classes=10, seed=0):
  """Return parameters and state with random values of the model's dtypes."""
  rng = np.random.default_rng(seed)
  return tuple(
    {
      path: {
        leaf: np.asarray(9 * rng.standard_normal(a.shape), a.dtype)
        for leaf, a in leaves.items()
      }
      for path, leaves in tree.items()
    }
    for tree in abstract(name, num_classes)
  )


def flat(params, model_state=()):
  """Return arrays under the names of this project's files."""
  return {
    f'{kind}/{path}/{leaf}': array
    for kind, tree in (('params', params), ('state', dict(model_state)))
    for path, leaves in tree.items()
    for leaf, array in leaves.items()
  }


def assert_equal(ours, theirs):
  """Compare trees of arrays bit for bit, and their dtypes."""
  assert ours.keys() == theirs.keys()
  for path, leaves in theirs.items():
    assert ours[path].keys() == leaves.keys()
    for leaf, array in leaves.items():
      assert ours[path][leaf].dtype == array.dtype, (path, leaf)
      assert ours[path][leaf].shape == array.shape, (path, leaf)
      assert ours[path][leaf].tobytes() == array.tobytes(), (path, leaf)


def npy(array):
  file = io.BytesIO()
  np.save(file, array)
  return file.getvalue()


def npy_header(descr, shape, body=b'', version=b'\x01\x00'):
  """Return an `.npy` with any header."""
  header = repr({'descr': descr, 'fortran_order': False, 'shape': shape})
  return npy_raw(header.encode(), body, version)


def npy_raw(header, body=b'', version=b'\x01\x00'):
  length = struct.pack('<H' if version[0] == 1 else '<I', len(header))
  return b'\x93NUMPY' + version + length + header + body


def archive(members, method=zipfile.ZIP_DEFLATED):
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w', method) as zipped:
    for name, content in members:
      zipped.writestr(name, content)
  return file.getvalue()


def safetensors(header, body=b''):
  if not isinstance(header, bytes):
    header = json.dumps(header).encode()
  return struct.pack('<Q', len(header)) + header + body
