"""Read pickled arrays without running the code that a pickle may hold.

The published weights are pickles, and a pickle is a program: it may call any
function that it names. Here every name is resolved to a function of this file,
and these build nothing but arrays. The sizes that a pickle declares are
compared with what it holds before memory is allocated.
"""

from __future__ import annotations

from collections.abc import Callable
import io
import math
import pickle
import pickletools
import re
from typing import Any, Literal

import numpy as np

# Opcodes that pickles of nested mappings of arrays use, protocols 2 to 5.
_OPCODES = frozenset(
  opcode
  for line in """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1
    BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES
    BINBYTES8 BYTEARRAY8 EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2
    TUPLE3 APPEND APPENDS SETITEM SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET
    LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD
  """.splitlines()
  for opcode in line.split()
)
# Codes of dtypes: float, int, unsigned, bool.
_DTYPE = re.compile(r'[fiub]\d{1,2}')
_MAX_AXES = 32
# typeshed describes the unpickler in C, which lacks most of its methods.
_PythonUnpickler: Any = pickle._Unpickler


class PickleError(ValueError):
  """A pickle is damaged, or holds something other than arrays."""


def read_pickle(data: bytes) -> Any:
  """Rebuild mappings, sequences, scalars and NumPy arrays from a pickle.

  Args:
    data: a pickle of protocol 2 to 5, written with `pickle` or `dill`.

  Returns:
    What was pickled; arrays are read-only views of its bytes.

  Raises:
    PickleError: if it is damaged, declares more than it holds, or names
      anything that arrays do not need; the message has the name.

  Example:
    >>> read_pickle(pickle.dumps({'w': np.ones(2)}))
    {'w': array([1., 1.])}
  """
  try:
    opcodes = _count_opcodes(data)
    return _Finisher(opcodes).finish(_Unpickler(data).load())
  except PickleError:
    raise
  except Exception as error:  # A damaged pickle raises many kinds.
    raise PickleError(f'the pickle is damaged: {error}') from error


def _count_opcodes(data: bytes) -> int:
  """Count the opcodes, and check that their arguments are complete.

  `genops` reads up to the end of the data, where the unpickler would first
  allocate as much as a length declares.
  """
  return sum(1 for _ in pickletools.genops(data))


def _refusal(opcode: str) -> Callable:
  def refuse(unpickler: _Unpickler) -> None:
    raise PickleError(f'the pickle uses {opcode}, which arrays do not need')

  return refuse


class _Unpickler(_PythonUnpickler):
  """Resolves the names that pickled arrays use to functions of this file.

  It extends the unpickler in Python, because the one in C hashes any key, and
  deeply nested tuples overflow the stack there.
  """

  def __init__(self, data: bytes):
    super().__init__(io.BytesIO(data))
    self._unencoded = len(data)

  def find_class(self, module: str, name: str) -> Callable:
    if (module, name) == ('_codecs', 'encode'):
      return _Builder(self._encode)
    # NumPy 2 renamed numpy.core to numpy._core.
    known = _BUILDERS.get((module.replace('numpy._core', 'numpy.core'), name))
    if known is None:
      raise PickleError(
        f'the pickle holds a {f"{module}.{name}"!r}, which is no array; it was '
        'not loaded'
      )
    return known

  def _encode(self, text: str, encoding: str = 'utf-8') -> bytes:
    """Stand in for `_codecs.encode`, with which protocol 2 writes bytes."""
    if encoding != 'latin1':
      raise PickleError(f'the pickle encodes text as {encoding!r}')
    self._unencoded -= len(text)
    if self._unencoded < 0:
      raise PickleError('the pickle encodes the same text repeatedly')
    return text.encode('latin1')

  def load_setitem(self) -> None:
    _check_key(self.stack[-2])
    super().load_setitem()

  def load_setitems(self) -> None:
    for key in self.stack[::2]:
      _check_key(key)
    super().load_setitems()

  dispatch = {
    **{
      ord(opcode.code): _refusal(opcode.name)
      if opcode.name not in _OPCODES
      else _PythonUnpickler.dispatch[ord(opcode.code)]
      for opcode in pickletools.opcodes
    },
    pickle.SETITEM[0]: load_setitem,
    pickle.SETITEMS[0]: load_setitems,
  }


def _check_key(key: Any) -> None:
  if not isinstance(key, str):
    raise PickleError(
      f'a mapping of the pickle has a key of type {type(key).__name__}, not str'
    )


class _DType:
  """Stands in for `numpy.dtype` while a pickle is read."""

  def __init__(self, code: str, align: bool = False, copy: bool = False):
    self.dtype = _simple_dtype(code)

  def __setstate__(self, state: tuple) -> None:
    _, order, subarray, names, fields, *_ = state
    if subarray or names or fields or order not in ('<', '>', '|', '='):
      raise PickleError('the pickle holds a structured dtype')
    self.dtype = self.dtype.newbyteorder(order)


def _simple_dtype(code: str) -> np.dtype:
  if not isinstance(code, str) or not _DTYPE.fullmatch(code):
    raise PickleError(f'the pickle holds an array of dtype {code!r}')
  return np.dtype(code)


class _Array:
  """Stands in for a `numpy.ndarray` while a pickle is read."""

  array: np.ndarray | None = None

  def __setstate__(self, state: tuple) -> None:
    _, shape, dtype, is_fortran, raw = state
    self.array = _view(raw, dtype, shape, 'F' if is_fortran else 'C')


def _view(
  raw: bytes, dtype: _DType, shape: tuple, order: Literal['C', 'F']
) -> np.ndarray:
  """View bytes as an array, if there are as many as its shape declares."""
  if len(shape) > _MAX_AXES or not all(
    isinstance(size, int) and size >= 0 for size in shape
  ):
    raise PickleError(f'the pickle holds an array of shape {shape}')
  declared = math.prod(shape) * dtype.dtype.itemsize
  if declared != len(raw):
    raise PickleError(
      f'an array of shape {shape} declares {declared:,} bytes and has '
      f'{len(raw):,}'
    )
  return np.frombuffer(raw, dtype.dtype).reshape(shape, order=order)


def _reconstruct(kind: type, shape: tuple, code: bytes) -> _Array:
  """Stand in for `numpy.core.multiarray._reconstruct`; the state follows."""
  return _Array()


def _from_buffer(
  raw: bytes,
  dtype: _DType,
  shape: tuple,
  order: str,
  axes: tuple | None = None,
) -> np.ndarray:
  """Stand in for `numpy.core.numeric._frombuffer`, which protocol 5 uses."""
  array = _view(raw, dtype, shape, 'F' if order == 'F' else 'C')
  return array if axes is None else array.transpose(axes)


def _scalar(dtype: _DType, raw: bytes) -> np.ndarray:
  """Stand in for `numpy.core.multiarray.scalar`; return an array of rank 0."""
  return _view(raw, dtype, (), 'C')


def _create_array(
  function: Callable, arguments: tuple, state: tuple, attributes: Any = None
) -> _Array:
  """Stand in for `dill._dill._create_array`, in which dill wraps arrays."""
  array = _Array()
  array.__setstate__(state)
  return array


def _empty_bytes() -> bytes:
  """Stand in for `bytes` without arguments, with which protocol 2 makes b''."""
  return b''


def _empty_mapping() -> dict:
  """Stand in for `collections.OrderedDict`; the items follow."""
  return {}


class _Builder:
  """A function that a pickle may call but not change."""

  __slots__ = ('function',)

  def __init__(self, function: Callable):
    self.function = function

  def __call__(self, *arguments: Any) -> Any:
    return self.function(*arguments)

  def __setstate__(self, state: Any) -> None:
    raise PickleError('the pickle changes a function')


_BUILDERS = {
  ('numpy', 'ndarray'): _Builder(_Array),
  ('numpy', 'dtype'): _Builder(_DType),
  ('numpy.core.multiarray', '_reconstruct'): _Builder(_reconstruct),
  ('numpy.core.multiarray', 'scalar'): _Builder(_scalar),
  ('numpy.core.numeric', '_frombuffer'): _Builder(_from_buffer),
  ('dill._dill', '_create_array'): _Builder(_create_array),
  ('__builtin__', 'bytes'): _Builder(_empty_bytes),
  ('collections', 'OrderedDict'): _Builder(_empty_mapping),
}


class _Finisher:
  """Replaces the stand-ins for arrays, in nested mappings and sequences."""

  def __init__(self, opcodes: int):
    # Each value took an opcode to make. A pickle that refers to one container
    # repeatedly could unfold to any size.
    self._left = opcodes

  def finish(self, value: Any) -> Any:
    self._left -= 1
    if self._left < 0:
      raise PickleError('the pickle refers to the same containers repeatedly')
    if isinstance(value, (_DType, _Builder)):
      raise PickleError('the pickle holds a part of an array')
    if isinstance(value, _Array):
      if value.array is None:
        raise PickleError('an array of the pickle has no contents')
      return value.array
    if isinstance(value, dict):
      return {name: self.finish(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
      return type(value)(self.finish(item) for item in value)
    return value
