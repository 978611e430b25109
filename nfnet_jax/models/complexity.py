"""Counts of a model's parameters and multiply-adds, without running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import json
import math
import pathlib
from typing import Any

import jax
from jax.extend import core
import jax.numpy as jnp

from nfnet_jax.models import registry

# Sizes of this package's models, which tests compare with the models.
STRUCTURE = pathlib.Path(__file__).with_name('structure.json')


def count_model(name: str) -> tuple[int, int]:
  """Return the numbers of parameters and of multiply-adds of a model.

  The sizes of this package's models are stored, because tracing a deep network
  takes seconds. Other registered models are traced.

  Args:
    name: registry name.

  Returns:
    Parameters, and multiply-adds of one image of the test size.

  Examples:
    >>> count_model('nfnet_f0')
    (71489284, 12384198656)
  """
  stored = json.loads(STRUCTURE.read_text()).get(name)
  if stored:
    return stored['parameters'], stored['macs_at_test_size']
  params, _, macs = trace_model(name)
  return count_parameters(params), macs


def trace_model(name: str) -> tuple[Any, Any, int]:
  """Return shapes of a model's parameters and state, and its multiply-adds.

  One image of the test size goes through initialisation, which computes what
  evaluation does.
  """
  model = registry.create_model(name)
  size = model.spec.test_size
  shapes = []

  def init(key: jax.Array, images: jax.Array) -> Any:
    variables = model.init(key, images, False)
    shapes.append(jax.eval_shape(lambda: variables))
    return variables

  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  macs = count_macs(init, jax.random.key(0), images)
  params, state = shapes[0]
  return params, state, macs


def count_parameters(params: Any) -> int:
  """Return the number of scalars in a tree of arrays or shapes."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def count_macs(function: Callable[..., Any], *args: Any) -> int:
  """Count multiply-adds of the convolutions and matrix products of a call.

  Args:
    function: any traceable function.
    *args: arrays or `jax.ShapeDtypeStruct`s; nothing is computed.

  Returns:
    What the paper's tables call FLOPs, if `function` is a network in evaluation
    on one image of its test size. Elementwise work, pooling and weight
    standardisation do not count. Loop bodies count once.

  Examples:
    >>> count_macs(jnp.dot, jnp.zeros((2, 3)), jnp.zeros((3, 4)))
    24
  """
  return _jaxpr_macs(jax.make_jaxpr(function)(*args).jaxpr)


def count_image_macs(
  model: registry.Model, params: Any, state: Any, size: int
) -> int:
  """Count the multiply-adds of one image of `size` pixels in evaluation.

  Args:
    model: a `registry.Model`.
    params: its parameters, or their shapes.
    state: its state, or its shapes.
    size: pixels a side.
  """
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  logits = lambda p, s, i: model.apply(p, s, None, i, False)[0]
  return count_macs(logits, params, state, images)


def _jaxpr_macs(jaxpr: core.Jaxpr) -> int:
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'conv_general_dilated':
      total += _convolution_macs(equation)
    elif equation.primitive.name == 'dot_general':
      total += _dot_macs(equation)
    total += sum(_jaxpr_macs(inner) for inner in _inner_jaxprs(equation))
  return total


def _inner_jaxprs(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
  for inner in jax.tree.leaves(
    list(equation.params.values()),
    is_leaf=lambda p: isinstance(p, (core.Jaxpr, core.ClosedJaxpr)),
  ):
    if isinstance(inner, core.ClosedJaxpr):
      yield inner.jaxpr
    elif isinstance(inner, core.Jaxpr):
      yield inner


def _convolution_macs(equation: core.JaxprEqn) -> int:
  kernel: Any = equation.invars[1].aval
  out_dim = equation.params['dimension_numbers'].rhs_spec[0]
  per_output = math.prod(kernel.shape) // kernel.shape[out_dim]
  output: Any = equation.outvars[0].aval
  return output.size * per_output


def _dot_macs(equation: core.JaxprEqn) -> int:
  (contracted, _), _ = equation.params['dimension_numbers']
  left: Any = equation.invars[0].aval
  depth = math.prod(left.shape[axis] for axis in contracted)
  output: Any = equation.outvars[0].aval
  return output.size * depth
