"""A reader of pickled arrays that can build nothing but arrays.

The published weights are pickles, and a pickle is a program: it may call
anything that it can name. Here every name stands for a function of this file.
What a pickle declares about sizes is compared with what it holds before any of
it is believed.
"""

from collections.abc import Callable
import io
import math
import pickle
import pickletools
from typing import Any

import numpy as np

# Opcodes of pickles of nested mappings of arrays, protocols 2 to 5.
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
_KINDS = 'fiub'  # Of dtypes: float, int, unsigned, bool.


class PickleError(ValueError):
  """A pickle is damaged, or holds something other than arrays."""


def read_pickle(data: bytes) -> Any:
  """Rebuilds mappings, sequences, scalars and numpy arrays from a pickle.

  Args:
    data: a pickle of protocol 2 to 5, written with `pickle` or `dill`.

  Returns:
    What was pickled; arrays are read-only views of its bytes.

  Raises:
    PickleError: if it is damaged, declares more than it holds, or names
      anything else than what arrays are made of; the message has the name.

  Example:
    >>> read_pickle(pickle.dumps({'w': np.ones(2)}))
    {'w': array([1., 1.])}
  """
  try:
    opcodes = _check_opcodes(data)
    return _Finisher(opcodes).finish(_Unpickler(io.BytesIO(data)).load())
  except PickleError:
    raise
  except Exception as error:  # A damaged pickle raises anything.
    raise PickleError(f'the pickle is damaged: {error}') from error


def _check_opcodes(data: bytes) -> int:
  """Checks that opcodes are known and their arguments there; counts them.

  `genops` reads no further than the data go, where the unpickler would first
  allocate what a length announces.
  """
  count = 0
  for opcode, argument, position in pickletools.genops(data):
    count += 1
    if opcode.name not in _OPCODES:
      raise PickleError(
        f'the pickle uses {opcode.name} at byte {position}, which arrays do '
        'not need'
      )
    # The unpickler makes room for as many as the index says.
    if opcode.name == 'LONG_BINPUT' and argument > count:
      raise PickleError(f'the pickle is damaged at byte {position}')
  return count


class _Unpickler(pickle.Unpickler):
  """Resolves the names that pickled arrays use to functions of this file."""

  def find_class(self, module: str, name: str) -> Callable:
    # NumPy 2 renamed numpy.core to numpy._core.
    known = _BUILDERS.get((module.replace('numpy._core', 'numpy.core'), name))
    if known is None:
      raise PickleError(
        f"the pickle holds a '{module}.{name}', which is no array; it was not "
        'loaded'
      )
    return known


class _DType:
  """Stands for `numpy.dtype` while a pickle is read."""

  def __init__(self, code: str, align: bool = False, copy: bool = False):
    self.dtype = _simple_dtype(code)

  def __setstate__(self, state: tuple) -> None:
    _, order, subarray, names, fields, *_ = state
    if subarray or names or fields or order not in ('<', '>', '|', '='):
      raise PickleError('the pickle holds a structured dtype')
    self.dtype = self.dtype.newbyteorder(order)


def _simple_dtype(code: str) -> np.dtype:
  if not isinstance(code, str) or len(code) > 3 or code[0] not in _KINDS:
    raise PickleError(f'the pickle holds an array of dtype {code!r}')
  return np.dtype(code)


class _Array:
  """Stands for a `numpy.ndarray` while a pickle is read."""

  array: np.ndarray | None = None

  def __setstate__(self, state: tuple) -> None:
    _, shape, dtype, is_fortran, raw = state
    self.array = _view(raw, dtype, shape, 'F' if is_fortran else 'C')


def _view(raw: bytes, dtype: _DType, shape: tuple, order: str) -> np.ndarray:
  """Views bytes as an array, if they are as many as its shape declares."""
  if not all(isinstance(size, int) and size >= 0 for size in shape):
    raise PickleError(f'the pickle holds an array of shape {shape}')
  declared = math.prod(shape) * dtype.dtype.itemsize
  if declared != len(raw):
    raise PickleError(
      f'an array of shape {shape} declares {declared:,} bytes and has '
      f'{len(raw):,}'
    )
  array = np.frombuffer(raw, dtype.dtype).reshape(shape, order=order)
  return array.astype(dtype.dtype.newbyteorder('='), copy=False)


def _reconstruct(kind: type, shape: tuple, code: bytes) -> _Array:
  """As `numpy.core.multiarray._reconstruct`; the state follows."""
  return _Array()


def _from_buffer(
  raw: bytes, dtype: _DType, shape: tuple, order: str
) -> np.ndarray:
  """As `numpy.core.numeric._frombuffer`, which protocol 5 uses."""
  return _view(raw, dtype, shape, 'F' if order == 'F' else 'C')


def _scalar(dtype: _DType, raw: bytes) -> np.ndarray:
  """As `numpy.core.multiarray.scalar`, giving an array without axes."""
  return _view(raw, dtype, (), 'C')


def _create_array(
  function: Callable, arguments: tuple, state: tuple, attributes: Any = None
) -> _Array:
  """As `dill._dill._create_array`, which dill wraps arrays in."""
  array = _Array()
  array.__setstate__(state)
  return array


def _encode(text: str, encoding: str = 'utf-8') -> bytes:
  """As `_codecs.encode`, through which protocol 2 spells bytes."""
  if encoding != 'latin1':
    raise PickleError(f"the pickle encodes text as '{encoding}'")
  return text.encode('latin1')


class _Builder:
  """A function that a pickle may call, and do nothing else with."""

  __slots__ = ('function',)

  def __init__(self, function: Callable):
    self.function = function

  def __call__(self, *arguments):
    return self.function(*arguments)

  def __setstate__(self, state: Any) -> None:
    raise PickleError('the pickle changes a function')


_BUILDERS = {
  name: _Builder(function)
  for name, function in {
    ('numpy', 'ndarray'): _Array,
    ('numpy', 'dtype'): _DType,
    ('numpy.core.multiarray', '_reconstruct'): _reconstruct,
    ('numpy.core.multiarray', 'scalar'): _scalar,
    ('numpy.core.numeric', '_frombuffer'): _from_buffer,
    ('dill._dill', '_create_array'): _create_array,
    ('_codecs', 'encode'): _encode,
    ('collections', 'OrderedDict'): dict,
  }.items()
}


class _Finisher:
  """Replaces what stood for arrays, in mappings and sequences."""

  def __init__(self, opcodes: int):
    # Each value took an opcode to make; a pickle that refers to one container
    # over and over would unfold without end.
    self._left = opcodes

  def finish(self, value: Any) -> Any:
    self._left -= 1
    if self._left < 0:
      raise PickleError('the pickle refers to the same containers repeatedly')
    if isinstance(value, _Array):
      if value.array is None:
        raise PickleError('an array of the pickle has no contents')
      return value.array
    if isinstance(value, dict):
      return {name: self.finish(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
      return type(value)(self.finish(item) for item in value)
    return value
