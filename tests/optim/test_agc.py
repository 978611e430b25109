"""`nfnet_jax.agc` on any leaf and tree, next to optax.adaptive_grad_clip."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nfnet_jax

# Float32 under jit: fusion rounds differently.
JIT_RTOL = 2e-6
QUICK_SHAPES = [(), (7,), (4, 6), (1, 5), (3, 1, 1), (3, 4, 5), (3, 3, 4, 8)]
SLOW_SHAPES = [
  (1,),
  (1, 1),
  (5, 1),
  (1, 4, 5),
  (1, 1, 1, 8),
  (8, 1, 1, 1),
  (1, 1, 4, 8),
  (2, 1, 1, 1, 5),
  (2, 3, 3, 4, 5),
]


def draw(shape, seed=0, dtype=jnp.float32):
  """Draw a gradient and its weight; about half of the units exceed 0.1."""
  rng = np.random.default_rng(seed)
  weight = rng.standard_normal(shape)
  grad = rng.standard_normal(shape)
  if shape:
    grad *= 10 ** rng.uniform(-2, 0, shape[-1])
    weight[..., 0] = 0  # Where this is a unit, eps is the weight norm.
  return jnp.asarray(grad, dtype), jnp.asarray(weight, dtype)


def run(tx, grads, params, update=None):
  return (update or tx.update)(grads, tx.init(params), params)


def clip(grads, params, *args, **kwargs):
  return run(nfnet_jax.agc(*args, **kwargs), grads, params)[0]


def assert_same_bits(actual, desired):
  """Compare leaves: NaN equals NaN, and -0 equals only -0."""
  jax.tree.map(np.testing.assert_array_equal, actual, desired)
  jax.tree.map(
    lambda a, d: np.testing.assert_array_equal(np.signbit(a), np.signbit(d)),
    actual,
    desired,
  )


def assert_close(actual, desired, rtol=JIT_RTOL):
  assert jax.tree.structure(actual) == jax.tree.structure(desired)
  check = functools.partial(np.testing.assert_allclose, rtol=rtol)
  jax.tree.map(check, actual, desired)


@pytest.mark.parametrize(
  'shape',
  [
    *QUICK_SHAPES,
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in SLOW_SHAPES),
  ],
  ids=str,
)
def test_equals_optax(shape):
  grad, weight = draw(shape)
  desired, _ = run(optax.adaptive_grad_clip(0.1), grad, weight)
  tx = nfnet_jax.agc(0.1)
  assert_same_bits(run(tx, grad, weight)[0], desired)
  assert_close(run(tx, grad, weight, jax.jit(tx.update))[0], desired)


def test_defaults_are_those_of_the_paper():
  grad, weight = draw((4, 6))
  desired, _ = run(optax.adaptive_grad_clip(0.01, 1e-3), grad, weight)
  assert_same_bits(clip(grad, weight), desired)


def test_higher_ranks_reduce_over_all_axes_but_the_last():
  grad, weight = draw((2, 2, 1, 3, 2, 4))
  with pytest.raises(ValueError, match='Expected parameter with shape'):
    run(optax.adaptive_grad_clip(0.1), grad, weight)
  explicit = optax.adaptive_grad_clip(0.1, axis=(0, 1, 2, 3, 4))
  assert_same_bits(clip(grad, weight, 0.1), run(explicit, grad, weight)[0])


@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit], ids=['eager', 'jit'])
@pytest.mark.parametrize('scale', [1.0, 2.0**-24], ids=['unit', 'below_1e-6'])
def test_norm_at_its_bound_counts_as_clipped(wrap, scale):
  """Exact in float32; below optax's minimum of 1e-6 its update differs too."""
  grad = scale * jnp.array([[3.0, 3.0, 3.0], [4.0, 4.0 - 2**-21, 4.0 + 2**-20]])
  weight = scale * jnp.full((2, 3), jnp.array([[6.0], [8.0]]))
  tx = nfnet_jax.agc(0.5, eps=0.0)
  updates, state = run(tx, grad, weight, wrap(tx.update))
  desired, _ = run(optax.adaptive_grad_clip(0.5, 0.0), grad, weight)
  assert_close(updates, desired, 0 if wrap is not jax.jit else JIT_RTOL)
  assert state.clipped == np.float32(2) / 3


@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit], ids=['eager', 'jit'])
def test_unclipped_subnormals_keep_their_bits(wrap):
  grad = np.array([1e-40, -1e-42, 1e-45, -0.0], np.float32)
  tx = nfnet_jax.agc()
  actual = run(tx, jnp.asarray(grad), jnp.ones(4), wrap(tx.update))[0]
  np.testing.assert_array_equal(
    np.asarray(actual).view(np.uint32), grad.view(np.uint32)
  )


@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit], ids=['eager', 'jit'])
def test_nan_and_infinity_are_treated_as_optax_does(wrap):
  grad, weight = (np.array(x) for x in draw((3, 8)))
  grad[0, :3] = np.nan, np.inf, -np.inf
  grad[:, 7] = 0
  weight[0, 3:5] = np.nan, np.inf
  tx, theirs = nfnet_jax.agc(0.1), optax.adaptive_grad_clip(0.1)
  grad, weight = jnp.asarray(grad), jnp.asarray(weight)
  actual, state = run(tx, grad, weight, wrap(tx.update))
  desired, _ = run(theirs, grad, weight)
  assert_close(actual, desired)
  passed = np.array(actual == grad).all(axis=0)
  assert passed[4]
  assert passed[7]
  assert not passed[:4].any()
  assert state.clipped == np.float32(8 - passed.sum()) / 8


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_half_precision_computes_norms_in_float32(dtype):
  grad, weight = draw((64, 5), dtype=dtype)
  wide = clip(grad.astype(jnp.float32), weight.astype(jnp.float32), 0.1)
  actual = clip(grad, weight, 0.1)
  assert actual.dtype == dtype
  assert_same_bits(actual, wide.astype(dtype))


def test_dtypes_may_differ_by_leaf_and_from_the_weights():
  grads = {'a': draw((4, 6))[0], 'b': draw((4, 6))[0].astype(jnp.bfloat16)}
  params = {'a': draw((4, 6))[1].astype(jnp.bfloat16), 'b': draw((4, 6))[1]}
  updates = clip(grads, params, 0.1)
  assert updates['a'].dtype == jnp.float32
  assert updates['b'].dtype == jnp.bfloat16


def test_large_float16_does_not_overflow():
  grad = jnp.full((4,), 3e4, jnp.float16)
  actual = clip(grad, jnp.full((4,), 5e4, jnp.float16), 0.3)
  np.testing.assert_allclose(actual, 1.5e4, rtol=1e-3)


def test_complex_norm_includes_the_imaginary_part():
  grad, weight = (1 + 2j) * draw((4, 6))[0], (2 - 1j) * draw((4, 6))[1]
  desired, _ = run(optax.adaptive_grad_clip(0.1), grad, weight)
  assert_close(clip(grad, weight, 0.1), desired)


class Pair(NamedTuple):
  kernel: jax.Array
  bias: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
  kernel: jax.Array
  bias: jax.Array


TREES = {
  'haiku': lambda w, b: {'net/~/conv': {'w': w, 'b': b}, 'net/~/out': {'w': b}},
  'flax': lambda w, b: {'params': {'Dense_0': {'kernel': w, 'bias': b}}},
  'list': lambda w, b: [w, [b]],
  'tuple': lambda w, b: (w, (b,)),
  'named_tuple': lambda w, b: {'layer': Pair(w, b)},
  'dataclass': lambda w, b: [Layer(w, b)],
  'bare': lambda w, b: w,
}
PATHS = {
  'haiku': ['net/~/conv/b', 'net/~/conv/w', 'net/~/out/w'],
  'flax': ['params/Dense_0/bias', 'params/Dense_0/kernel'],
  'list': ['0', '1/0'],
  'tuple': ['0', '1/0'],
  'named_tuple': ['layer/kernel', 'layer/bias'],
  'dataclass': ['0/kernel', '0/bias'],
  'bare': [''],
}


def make_tree(name, seed=0):
  (dw, w), (db, b) = draw((3, 3, 4, 8), seed), draw((8,), seed)
  return TREES[name](dw, db), TREES[name](w, b)


def shapes_of(state):
  return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)


@pytest.mark.parametrize('name', TREES)
def test_any_tree_keeps_its_structure_and_that_of_its_state(name):
  grads, params = make_tree(name)
  seen = []
  group_fn = lambda path: seen.append(path) or 'all'
  tx = nfnet_jax.agc(0.1, group_fn=group_fn)
  state = tx.init(params)
  assert seen == PATHS[name]
  updates, after = tx.update(grads, state, params)
  desired, _ = run(optax.adaptive_grad_clip(0.1), grads, params)
  assert jax.tree.structure(updates) == jax.tree.structure(grads)
  assert_same_bits(updates, desired)
  assert shapes_of(after) == shapes_of(state)
  assert shapes_of(jax.jit(tx.update)(grads, state, params)[1]) == shapes_of(
    state
  )
  # lax.scan requires the same structure, shapes and dtypes.
  step = lambda s, _: (tx.update(grads, s, params)[1], None)
  last, _ = jax.lax.scan(step, state, length=3)
  assert last.count == 3
  assert last.clipped_by_group['all'] == last.clipped == after.clipped


def test_state_can_be_created_abstractly():
  _, params = make_tree('flax')
  tx = nfnet_jax.agc(group_fn=lambda path: path)
  abstract = jax.eval_shape(tx.init, params)
  assert abstract.clipped_by_group.keys() == set(PATHS['flax'])
