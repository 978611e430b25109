"""Read pickled arrays without running the code that a pickle may hold.

The published weights are pickles, and a pickle is a program: it may call any
function that it names. Here `pickletools` reads its opcodes, and this file
interprets those that arrays need. A pickle can name only the functions in
`_FUNCTIONS`, which build nothing but arrays and plain values.
"""

from __future__ import annotations

from collections.abc import Callable
import io
import math
import pickletools
import re
from typing import Any

import numpy as np

# Opcode -> how many values it takes from the stack; None is all from a mark.
_TAKEN = {
  **dict.fromkeys(('TUPLE', 'APPENDS', 'SETITEMS')),
  **dict.fromkeys(('TUPLE1', 'APPEND', 'BUILD'), 1),
  **dict.fromkeys(('TUPLE2', 'SETITEM', 'REDUCE', 'STACK_GLOBAL'), 2),
  'TUPLE3': 3,
}
# Codes of dtypes: float, int, unsigned, bool.
_DTYPE = re.compile(r'[fiub]\d{1,2}')
_MAX_AXES = 32


class PickleError(ValueError):
  """A pickle is damaged, or holds something other than arrays."""


def read_pickle(data: bytes) -> Any:
  """Rebuild mappings, sequences, scalars and NumPy arrays from a pickle.

  Args:
    data: a pickle of protocol 2 to 5, written with `pickle` or `dill`.

  Returns:
    What was pickled. Arrays are read-only, and from protocol 3 on views of
    `data`, whose elements need not be aligned.

  Raises:
    PickleError: if it is damaged, declares more than it holds, or names
      anything that arrays do not need; the message has the name.

  Examples:
    >>> import pickle
    >>> read_pickle(pickle.dumps({'w': np.ones(2)}))
    {'w': array([1., 1.])}
  """
  try:
    return _Interpreter(data).run()
  except PickleError:
    raise
  except Exception as error:  # A damaged pickle raises many kinds.
    raise PickleError(f'the pickle is damaged: {error}') from error


class _Interpreter:
  """Runs the opcodes of a pickle: a stack, marks on it, and a memo."""

  def __init__(self, data: bytes):
    self._data = data
    self._stack: list[Any] = []
    self._below: list[list[Any]] = []  # The stack below each mark.
    self._memo: dict[int, Any] = {}
    # A pickle that refers to one value repeatedly could unfold to any size. But
    # each value took an opcode to make, and each byte took a byte.
    self._values_left = 0
    self._bytes_left = len(data)

  def run(self) -> Any:
    """Interpret all opcodes, and return the value that they leave."""
    file = io.BytesIO(self._data)
    # `genops` reads no further than the data, whatever length is declared.
    for opcode, argument, _ in pickletools.genops(file):
      self._values_left += 1
      if isinstance(argument, (bytes, bytearray)):
        start = file.tell() - len(argument)
        argument = memoryview(self._data)[start : file.tell()]
      self._step(opcode.name, argument)
    if len(self._stack) != 1:
      raise PickleError(f'the pickle leaves {len(self._stack)} values, not 1')
    return self._finish(self._stack[0])

  def _step(self, opcode: str, argument: Any) -> None:
    items = self._take(_TAKEN.get(opcode, 0))
    stack = self._stack
    match opcode:
      case 'PROTO' | 'FRAME' | 'STOP':
        pass
      case 'MARK':
        self._below.append(stack)
        self._stack = []
      case 'NONE':
        stack.append(None)
      case 'NEWTRUE' | 'NEWFALSE':
        stack.append(opcode == 'NEWTRUE')
      case 'BININT' | 'BININT1' | 'BININT2' | 'LONG1' | 'BINFLOAT':
        stack.append(argument)
      case 'BINUNICODE' | 'SHORT_BINUNICODE' | 'BINUNICODE8':
        stack.append(argument)
      case 'SHORT_BINBYTES' | 'BINBYTES' | 'BINBYTES8' | 'BYTEARRAY8':
        stack.append(argument)
      case 'EMPTY_DICT':
        stack.append({})
      case 'EMPTY_LIST':
        stack.append([])
      case 'EMPTY_TUPLE' | 'TUPLE' | 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
        stack.append(tuple(items))
      case 'APPEND' | 'APPENDS':
        stack[-1].extend(items)
      case 'SETITEM' | 'SETITEMS':
        _set_items(stack[-1], items)
      case 'BINPUT' | 'LONG_BINPUT':
        self._memo[argument] = stack[-1]
      case 'MEMOIZE':
        self._memo[len(self._memo)] = stack[-1]
      case 'BINGET' | 'LONG_BINGET':
        stack.append(self._memo[argument])
      case 'GLOBAL':
        stack.append(self._find(argument.replace(' ', '.')))
      case 'STACK_GLOBAL':
        stack.append(self._find('.'.join(items)))
      case 'REDUCE':
        function, arguments = items
        stack.append(function(*arguments))
      case 'BUILD':
        stack[-1].build(*items)
      case _:
        raise PickleError(f'the pickle uses {opcode}, which arrays do not need')

  def _take(self, count: int | None) -> list[Any]:
    """Take values from the stack, in the order in which they were pushed."""
    if count is None:
      items, self._stack = self._stack, self._below.pop()
      return items
    return [self._stack.pop() for _ in range(count)][::-1]

  def _find(self, name: str) -> Callable:
    functions = {**_FUNCTIONS, '_codecs.encode': self._encode}
    # NumPy 2 renamed numpy.core to numpy._core.
    known = name.replace('numpy._core', 'numpy.core')
    if known not in functions:
      raise PickleError(
        f'the pickle holds a {name!r}, which is no array; it was not loaded'
      )
    return functions[known]

  def _encode(self, text: str, encoding: str) -> bytes:
    """Stand in for `_codecs.encode`, with which protocol 2 writes bytes."""
    if encoding != 'latin1':
      raise PickleError('the pickle encodes text in another way than latin1')
    self._spend_bytes(len(text))
    return text.encode('latin1')

  def _spend_bytes(self, count: int) -> None:
    self._bytes_left -= count
    if self._bytes_left < 0:
      raise PickleError('the pickle copies the same text or bytes repeatedly')

  def _finish(self, value: Any) -> Any:
    """Replace what stands for arrays and bytes, in nested containers."""
    self._values_left -= 1
    if self._values_left < 0:
      raise PickleError('the pickle refers to the same containers repeatedly')
    match value:
      case dict():
        return {name: self._finish(item) for name, item in value.items()}
      case list() | tuple():
        return type(value)([self._finish(item) for item in value])
      case memoryview():
        self._spend_bytes(len(value))
        return bytes(value)
      case _Array(contents=np.ndarray()):
        return value.contents
      case str() | bytes() | int() | float() | None | np.ndarray():
        return value
    raise PickleError('the pickle holds a part of an array')


def _set_items(mapping: dict, items: list[Any]) -> None:
  for key, value in zip(items[::2], items[1::2], strict=True):
    # Hashing deeply nested tuples would overflow the stack of C.
    if not isinstance(key, str):
      kind = type(key).__name__
      raise PickleError(f'the pickle has a key of type {kind}, not str')
    mapping[key] = value


class _DType:
  """A `numpy.dtype`, whose byte order may follow."""

  def __init__(self, code: str, *alignment: bool):
    if not _DTYPE.fullmatch(code):
      raise PickleError(f'the pickle holds an array of dtype {code!r}')
    self.dtype = np.dtype(code)

  def build(self, state: tuple) -> None:
    _, order, subarray, names, fields, *_ = state
    if subarray or names or fields or order not in ('<', '>', '|', '='):
      raise PickleError('the pickle holds a structured dtype')
    self.dtype = self.dtype.newbyteorder(order)


class _Array:
  """A `numpy.ndarray`, whose contents follow."""

  contents: np.ndarray | None = None

  def build(self, state: tuple) -> None:
    self.contents = _from_state(state)


def _from_state(state: tuple) -> np.ndarray:
  _, shape, dtype, is_fortran, raw = state
  return _view(raw, dtype, shape, 'F' if is_fortran else 'C')


def _view(
  raw: bytes | memoryview,
  dtype: _DType,
  shape: tuple,
  order: str = 'C',
  axes: tuple | None = None,
) -> np.ndarray:
  """View bytes as an array, if there are as many as its shape declares."""
  are_sizes = (isinstance(size, int) and size >= 0 for size in shape)
  if len(shape) > _MAX_AXES or not all(are_sizes):
    raise PickleError('the pickle holds an array of an invalid shape')
  declared = math.prod(shape) * dtype.dtype.itemsize
  if declared != len(raw):
    raise PickleError(
      f'an array of shape {shape} declares {declared:,} bytes and has '
      f'{len(raw):,}'
    )
  array = np.frombuffer(raw, dtype.dtype)
  array = array.reshape(shape, order='F' if order == 'F' else 'C')
  return array if axes is None else array.transpose(axes)


# What a pickle may call, and the functions that stand in for it.
_FUNCTIONS: dict[str, Callable] = {
  'numpy.ndarray': _Array,
  'numpy.dtype': _DType,
  'numpy.core.multiarray._reconstruct': lambda *parts: _Array(),
  'numpy.core.multiarray.scalar': lambda dtype, raw: _view(raw, dtype, ()),
  'numpy.core.numeric._frombuffer': _view,  # Protocol 5.
  'dill._dill._create_array': lambda *parts: _from_state(parts[2]),
  '__builtin__.bytes': lambda: b'',  # Protocol 2.
  'collections.OrderedDict': lambda: {},
}
