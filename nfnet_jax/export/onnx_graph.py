"""Convert a JAX function to an ONNX graph, operation by operation.

It knows the operations of this package's networks in inference. What depends
only on constants, such as weights, is computed during conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any

import jax
from jax import export
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import onnx
from onnx import helper, numpy_helper

# Versions that onnxruntime 1.20 and later read.
_OPSET, _IR_VERSION = 18, 10

# Operations that need no attributes: JAX's name -> ONNX's.
_SAME = {
  'abs': 'Abs',
  'add': 'Add',
  'and': 'And',
  'copy': 'Identity',
  'div': 'Div',
  'eq': 'Equal',
  'erf': 'Erf',
  'exp': 'Exp',
  'ge': 'GreaterOrEqual',
  'gt': 'Greater',
  'le': 'LessOrEqual',
  'log': 'Log',
  'logistic': 'Sigmoid',
  'lt': 'Less',
  'max': 'Max',
  'min': 'Min',
  'mul': 'Mul',
  'neg': 'Neg',
  'pow': 'Pow',
  'sqrt': 'Sqrt',
  'stop_gradient': 'Identity',
  'sub': 'Sub',
  'tanh': 'Tanh',
}
# Operations that call a function: name -> parameter that holds it.
_CALLS = {'jit': 'jaxpr', 'custom_jvp_call': 'call_jaxpr'}


def convert(
  function: Callable[[Mapping[str, Any], jax.Array], jax.Array],
  weights: Mapping[str, np.ndarray],
  image_shape: Sequence[int],
) -> onnx.ModelProto:
  """Convert a function of weights and images to an ONNX model.

  Args:
    function: maps weights and images `[N, H, W, 3]` to an array `[N, ...]`.
    weights: its first argument, which the model will contain.
    image_shape: `[H, W, 3]`.

  Returns:
    A model from `images [N, H, W, 3]` to `probabilities`, for any N. Only
    elementwise operations may use arrays that are broadcast, which is not
    checked: compare the results, as `onnx_file.save` does.

  Raises:
    ValueError: if an operation is not known.

  Examples:
    >>> scale = lambda weights, images: images * weights['scale']
    >>> model = convert(scale, {'scale': np.float32([1, 2, 3])}, (4, 4, 3))
    >>> [node.op_type for node in model.graph.node]
    ['Mul', 'Identity']
  """
  (batch,) = export.symbolic_shape('batch')
  images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
  names = sorted(weights)
  traced = jax.make_jaxpr(
    lambda images, *leaves: function(dict(zip(names, leaves)), images)
  )(images, *(weights[name] for name in names))
  converter = _Converter()
  constants = dict(zip(traced.jaxpr.constvars, traced.consts))
  constants |= {
    variable: weights[name]
    for name, variable in zip(names, traced.jaxpr.invars[1:])
  }
  first, (result,) = traced.jaxpr.invars[0], traced.jaxpr.outvars
  values = converter.run(traced.jaxpr, {**constants, first: 'images'})
  converter.add('Identity', values[0], name='probabilities')
  describe = lambda name, aval: helper.make_tensor_value_info(
    name, onnx.TensorProto.FLOAT, _shape(aval)
  )
  graph = helper.make_graph(
    converter.nodes,
    'network',
    [describe('images', first.aval)],
    [describe('probabilities', result.aval)],
    converter.initializers,
  )
  return helper.make_model(
    graph,
    opset_imports=[helper.make_opsetid('', _OPSET)],
    ir_version=_IR_VERSION,
    producer_name='nfnet_jax',
  )


def _shape(aval: Any) -> list[int | str]:
  return [d if isinstance(d, int) else 'batch' for d in aval.shape]


def _sides(aval: Any) -> list[int]:
  """Return the shape as ONNX's Reshape takes it, with -1 for the batch."""
  return [d if isinstance(d, int) else -1 for d in aval.shape]


class _Converter:
  """Collects the nodes of a graph.

  A value is a NumPy array if it is known, and otherwise the name of a tensor.
  Tensors may have sides of 1 where JAX has broadcast them: ONNX does so itself.
  """

  def __init__(self):
    self.nodes: list[onnx.NodeProto] = []
    self.initializers: list[onnx.TensorProto] = []

  def add(
    self, kind: str, *inputs: Any, name: str | None = None, **attributes: Any
  ) -> str:
    """Add a node, and return the name of its output."""
    output = name or f'{kind}_{len(self.nodes)}'
    names = [self._tensor(value) for value in inputs]
    self.nodes.append(helper.make_node(kind, names, [output], **attributes))
    return output

  def _tensor(self, value: Any) -> str:
    if isinstance(value, str):
      return value
    name = f'constant_{len(self.initializers)}'
    array = np.asarray(value, order='C')
    self.initializers.append(numpy_helper.from_array(array, name))
    return name

  def run(self, jaxpr: core.Jaxpr, values: dict[Any, Any]) -> list[Any]:
    """Convert equations, given the values of their inputs."""

    def read(atom: Any) -> Any:
      return np.asarray(atom.val) if hasattr(atom, 'val') else values[atom]

    for equation in _needed(jaxpr):
      inputs = [read(atom) for atom in equation.invars]
      values.update(zip(equation.outvars, self._convert(equation, inputs)))
    return [read(atom) for atom in jaxpr.outvars]

  def _convert(
    self, equation: core.JaxprEqn, inputs: list[Any]
  ) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    is_known = not any(isinstance(value, str) for value in inputs)
    outputs: list[Any] = [variable.aval for variable in equation.outvars]
    dims = [side for aval in outputs for side in aval.shape]
    if name in _CALLS:
      inner = params[_CALLS[name]]
      variables = [*inner.jaxpr.constvars, *inner.jaxpr.invars]
      known = dict(zip(variables, [*inner.consts, *inputs], strict=True))
      return self.run(inner.jaxpr, known)
    if is_known and all(isinstance(d, int) for d in dims):
      results = equation.primitive.bind(*inputs, **params)
      several = equation.primitive.multiple_results
      return [np.asarray(r) for r in (results if several else [results])]
    if name in _SAME:
      return [self.add(_SAME[name], *inputs)]
    if name not in _RULES:
      raise ValueError(f"The operation '{name}' cannot be exported to ONNX.")
    result = _RULES[name](self, equation, *inputs)
    return result if isinstance(result, list) else [result]


def _integers(values: Sequence[int]) -> np.ndarray:
  return np.array(values, np.int64)


def _needed(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
  """Return the equations on which the outputs depend."""
  wanted, equations = set(map(id, jaxpr.outvars)), []
  for equation in reversed(jaxpr.eqns):
    if any(id(variable) in wanted for variable in equation.outvars):
      wanted.update(map(id, equation.invars))
      equations.append(equation)
  return equations[::-1]


def _convolution(to: _Converter, equation: Any, x: Any, kernel: Any) -> str:
  params = equation.params
  if set(params['lhs_dilation'] + params['rhs_dilation']) != {1}:
    raise ValueError('Dilated convolutions cannot be exported to ONNX.')
  lhs, rhs, out = params['dimension_numbers']
  pads = params['padding']
  result = to.add(
    'Conv',
    to.add('Transpose', x, perm=lhs),
    np.transpose(kernel, rhs),
    strides=params['window_strides'],
    pads=[p for p, _ in pads] + [p for _, p in pads],
    group=params['feature_group_count'],
  )
  return to.add('Transpose', result, perm=np.argsort(out).tolist())


def _product(to: _Converter, equation: Any, x: Any, y: Any) -> str:
  contracted, batched = equation.params['dimension_numbers']
  last = equation.invars[0].aval.ndim - 1
  is_matrix = equation.invars[1].aval.ndim == 2
  if contracted != ((last,), (0,)) or batched != ((), ()) or not is_matrix:
    raise ValueError(
      f'A product over axes {contracted} cannot be exported to ONNX.'
    )
  return to.add('MatMul', x, y)


def _pool(to: _Converter, equation: Any, x: Any) -> str:
  """Pool `[N, H, W, C]` over height and width."""
  params = equation.params
  sides = params['window_dimensions'], params['window_strides']
  if {(each[0], each[3]) for each in sides} != {(1, 1)}:
    raise ValueError('Pooling of channels cannot be exported to ONNX.')
  windows, strides, pads = (
    params[name][1:3]
    for name in ('window_dimensions', 'window_strides', 'padding')
  )
  options = {
    'kernel_shape': windows,
    'strides': strides,
    'pads': [p for p, _ in pads] + [p for _, p in pads],
  }
  x = to.add('Transpose', x, perm=(0, 3, 1, 2))
  if equation.primitive.name == 'reduce_window_max':
    x = to.add('MaxPool', x, **options)
  else:
    x = to.add('AveragePool', x, count_include_pad=1, **options)
    x = to.add('Mul', x, np.float32(math.prod(windows)))
  return to.add('Transpose', x, perm=(0, 2, 3, 1))


def _reduce(kind: str) -> Callable[..., str]:
  def rule(to: _Converter, equation: Any, x: Any) -> str:
    axes = equation.params['axes']
    if not axes:  # ONNX would reduce all.
      return to.add('Identity', x)
    return to.add(kind, x, _integers(axes), keepdims=0)

  return rule


def _broadcast(to: _Converter, equation: Any, x: Any, *_: Any) -> str:
  """Insert axes; elementwise operations broadcast their sides of 1."""
  params, given = equation.params, _sides(equation.invars[0].aval)
  shape = [1] * len(params['shape'])
  for side, axis in zip(given, params['broadcast_dimensions']):
    shape[axis] = side
  return to.add('Reshape', x, _integers(shape))


def _reshape(to: _Converter, equation: Any, x: Any, *_: Any) -> str:
  return to.add('Reshape', x, _integers(_sides(equation.outvars[0].aval)))


def _power(to: _Converter, equation: Any, x: Any) -> str:
  exponent = equation.params['y']
  if exponent not in (2, 3):
    return to.add('Pow', x, np.float32(exponent))
  square = to.add('Mul', x, x)
  return square if exponent == 2 else to.add('Mul', square, x)


def _select(
  to: _Converter, _: Any, which: Any, otherwise: Any, chosen: Any
) -> str:
  return to.add('Where', which, chosen, otherwise)


def _cast(to: _Converter, equation: Any, x: Any) -> str:
  dtype = helper.np_dtype_to_tensor_dtype(equation.params['new_dtype'])
  return to.add('Cast', x, to=dtype)


def _split(to: _Converter, equation: Any, x: Any) -> list[str]:
  axis, sizes = _integers([equation.params['axis']]), equation.params['sizes']
  ends = np.cumsum(sizes)
  return [
    to.add('Slice', x, _integers([end - size]), _integers([end]), axis)
    for size, end in zip(sizes, ends)
  ]


_RULES: dict[str, Callable[..., Any]] = {
  'broadcast_in_dim': _broadcast,
  'concatenate': lambda to, equation, *values: to.add(
    'Concat', *values, axis=equation.params['dimension']
  ),
  'conv_general_dilated': _convolution,
  'convert_element_type': _cast,
  'dot_general': _product,
  'erfc': lambda to, _, x: to.add('Sub', np.float32(1), to.add('Erf', x)),
  'expm1': lambda to, _, x: to.add('Sub', to.add('Exp', x), np.float32(1)),
  'integer_pow': _power,
  'log1p': lambda to, _, x: to.add('Log', to.add('Add', x, np.float32(1))),
  'ne': lambda to, _, x, y: to.add('Not', to.add('Equal', x, y)),
  'reduce_max': _reduce('ReduceMax'),
  'reduce_sum': _reduce('ReduceSum'),
  'reduce_window_max': _pool,
  'reduce_window_sum': _pool,
  'reshape': _reshape,
  'select_n': _select,
  'split': _split,
  'square': lambda to, _, x: to.add('Mul', x, x),
  'squeeze': _reshape,
}
