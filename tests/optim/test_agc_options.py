"""Options, statistics and errors of `nfnet_jax.agc`; its use inside optax."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nfnet_jax

JIT_RTOL = 2e-6
SHAPES = {'conv': {'w': (3, 3, 4, 8), 'b': (8,)}, 'out': {'w': (6, 5)}}


def draw(seed, shapes=SHAPES):
  """Draw a tree in which about half of the units exceed a ratio of 0.1."""
  rng = np.random.default_rng(seed)
  draw_leaf = lambda shape: jnp.asarray(
    rng.standard_normal(shape) * 10 ** rng.uniform(-2, 0, shape[-1]),
    jnp.float32,
  )
  return jax.tree.map(draw_leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


PARAMS = jax.tree.map(jnp.sign, draw(0))
GRADS = draw(1)


def run(tx, grads=GRADS, params=PARAMS, update=None):
  return (update or tx.update)(grads, tx.init(params), params)


def assert_close(actual, desired, rtol=JIT_RTOL, atol=0.0):
  assert jax.tree.structure(actual) == jax.tree.structure(desired)
  check = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
  jax.tree.map(check, actual, desired)


assert_same = functools.partial(assert_close, rtol=0)


def inject(make):
  static = [x for x in ('axes', 'exclude', 'group_fn') if make is nfnet_jax.agc]
  schedule = optax.linear_schedule(0.4, 0.1, 3)
  return optax.inject_hyperparams(make, static_args=static)(schedule, eps=1e-3)


def partition(make):
  labels = {'conv': {'w': 'clip', 'b': 'free'}, 'out': {'w': 'clip'}}
  return optax.partition({'clip': make(0.1), 'free': optax.identity()}, labels)


COMPOSITIONS = {
  'chain': lambda make: optax.chain(
    make(0.1), optax.sgd(0.1, momentum=0.9, nesterov=True)
  ),
  'masked': lambda make: optax.masked(
    make(0.1), {'conv': {'w': True, 'b': False}, 'out': {'w': False}}
  ),
  'partition': partition,
  'MultiSteps': lambda make: optax.MultiSteps(
    make(0.1), every_k_schedule=2
  ).gradient_transformation(),
  'inject_hyperparams': inject,
}


@pytest.mark.parametrize('name', COMPOSITIONS)
def test_composes_with_optax_as_adaptive_grad_clip_does(name):
  """Four steps under jit and scan, each with its own gradients."""
  steps = [draw(seed) for seed in range(4)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps)

  @functools.partial(jax.jit, static_argnums=0)
  def run_all(tx):
    step = lambda state, grads: tx.update(grads, state, PARAMS)[::-1]
    return jax.lax.scan(step, tx.init(PARAMS), stacked)[1]

  compose = COMPOSITIONS[name]
  actual = run_all(compose(nfnet_jax.agc))
  # The terms of sums, such as momentum's, may cancel.
  desired = run_all(compose(optax.adaptive_grad_clip))
  assert_close(actual, desired, atol=1e-8)
  unclipped = run_all(compose(lambda *_, **__: optax.identity()))
  assert not np.allclose(actual['conv']['w'], unclipped['conv']['w'])


def test_masked_and_partition_exclude_others_from_the_statistics():
  for compose in (COMPOSITIONS['masked'], partition):
    tx = compose(functools.partial(nfnet_jax.agc, group_fn=lambda path: path))
    state = tx.init(PARAMS)
    if compose is partition:
      state = state.inner_states['clip']
    groups = state.inner_state.clipped_by_group
    assert 'conv/w' in groups
    assert 'conv/b' not in groups


def test_injected_clipping_can_be_set_between_updates():
  make = optax.inject_hyperparams(
    nfnet_jax.agc, static_args=('axes', 'exclude', 'group_fn')
  )
  tx = make(0.4, axes='output_last', group_fn=lambda path: 'all')
  state = tx.init(PARAMS)
  state.hyperparams['clipping'] = jnp.asarray(0.1)
  actual, state = tx.update(GRADS, state, PARAMS)
  desired, expected = run(nfnet_jax.agc(0.1))
  assert_same(actual, desired)
  assert state.inner_state.clipped_by_group['all'] == expected.clipped


def batch_of(size):
  trees = [(draw(2 * seed), draw(2 * seed + 1)) for seed in range(size)]
  tx = nfnet_jax.agc(0.1, group_fn=lambda path: path)
  results = [run(tx, grads, params) for grads, params in trees]
  stack = lambda *leaves: jnp.stack(leaves)
  return tx, jax.tree.map(stack, *trees), jax.tree.map(stack, *results)


def test_vmap_over_a_leading_axis():
  tx, (grads, params), desired = batch_of(3)
  actual = jax.jit(jax.vmap(functools.partial(run, tx)))(grads, params)
  assert_close(actual, desired)


def test_pmap_over_devices():
  tx, (grads, params), desired = batch_of(2)
  state = jax.pmap(tx.init)(params)
  assert_close(jax.pmap(tx.update)(grads, state, params), desired)


@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit], ids=['eager', 'jit'])
def test_schedule_is_read_at_the_count_of_updates(wrap):
  schedule = optax.piecewise_constant_schedule(0.4, {1: 0.5, 2: 0.5})
  tx = nfnet_jax.agc(schedule)
  state = tx.init(PARAMS)
  assert state.count == 0
  for count, ratio in enumerate([0.4, 0.2, 0.1]):
    updates, state = wrap(tx.update)(GRADS, state, PARAMS)
    assert_close(updates, run(optax.adaptive_grad_clip(ratio))[0])
    assert state.count == count + 1


@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit], ids=['eager', 'jit'])
def test_none_and_empty_leaves_pass(wrap):
  params = {
    'absent': jnp.ones(3),
    'both_absent': None,
    'empty': jnp.ones((0, 4), jnp.bfloat16),
    'w': jnp.ones((4, 2)),
  }
  grads = {**params, 'absent': None}
  tx = nfnet_jax.agc(group_fn=lambda path: path)
  updates, state = run(tx, grads, params, wrap(tx.update))
  assert updates['absent'] is updates['both_absent'] is None
  assert updates['empty'].shape == (0, 4)
  assert updates['empty'].dtype == jnp.bfloat16
  np.testing.assert_allclose(updates['w'], 0.01, rtol=JIT_RTOL)
  assert state.clipped == 1
  assert state.clipped_by_group == {'absent': 0, 'empty': 0, 'w': 1}


def test_tree_without_leaves_passes():
  updates, state = run(nfnet_jax.agc(), {}, {})
  assert updates == {}
  assert state.clipped == 0


def test_weight_may_be_a_python_number():
  updates, _ = run(nfnet_jax.agc(), {'scale': jnp.ones(())}, {'scale': 2.0})
  np.testing.assert_allclose(updates['scale'], 0.02, rtol=JIT_RTOL)


@pytest.mark.parametrize(
  ('shape', 'axes'),
  [
    ((8, 4, 3, 3), (1, 2, 3)),
    ((8, 4, 3), (1, 2)),
    ((8, 4), (1,)),
    ((8, 4, 3, 3, 2), (1, 2, 3, 4)),
    ((8,), (0,)),
    ((1, 8), (0, 1)),
    ((8, 1, 1), (0, 1, 2)),
    ((8, 1, 4, 1), (1, 2, 3)),
  ],
  ids=str,
)
def test_output_first_has_units_along_axis_0(shape, axes):
  grad, weight = draw(0, shape), draw(1, shape)
  actual, _ = run(nfnet_jax.agc(0.3, axes='output_first'), grad, weight)
  norm = lambda x: np.sqrt(np.sum(np.square(x), axis=axes, keepdims=True))
  limit = 0.3 * norm(weight)
  desired = np.where(norm(grad) < limit, grad, grad * limit / norm(grad))
  np.testing.assert_allclose(actual, desired, rtol=JIT_RTOL)


def test_output_last_is_the_default():
  assert_same(
    run(nfnet_jax.agc(0.1, axes='output_last')), run(nfnet_jax.agc(0.1))
  )


def test_function_for_axes_replaces_the_default():
  seen = {}

  def rule(path, shape):
    seen[path] = shape
    return (-2, -1) if path == 'conv/w' else (0,)

  actual, state = run(nfnet_jax.agc(0.1, axes=rule))
  assert seen == {'conv/b': (8,), 'conv/w': (3, 3, 4, 8), 'out/w': (6, 5)}
  for module, name, axis in [('conv', 'w', (2, 3)), ('out', 'w', 0)]:
    grad, weight = GRADS[module][name], PARAMS[module][name]
    desired, _ = run(optax.adaptive_grad_clip(0.1, axis=axis), grad, weight)
    assert_same(actual[module][name], desired)
    assert not np.array_equal(desired, grad)
  # The units: 9 of conv/w, 1 of conv/b, 5 of out/w.
  clipped = 15 * state.clipped.item()
  assert 0 < clipped < 15
  assert clipped == pytest.approx(round(clipped))


@pytest.mark.parametrize('scale', [0.1, 0.3, 5.0])
def test_layers_are_clipped_as_dreamerv3_does(scale):
  """It bounds each array's norm by 0.3 of its weights' norm, at least 1e-3."""
  rng = np.random.default_rng(0)
  params = {
    'w': rng.normal(size=(4, 5)),
    'b': np.zeros(5),
    'k': rng.normal(size=(3, 3, 4, 5)),
  }
  draw = lambda w: scale * (np.linalg.norm(w) + 1e-3) * rng.normal(size=w.shape)
  params = jax.tree.map(np.float32, params)
  updates = jax.tree.map(lambda w: np.float32(draw(w) / w.size**0.5), params)
  ours = nfnet_jax.agc(0.3, axes='layer')
  clipped, _ = ours.update(updates, ours.init(params), params)
  for name, update in updates.items():
    upper = 0.3 * max(1e-3, np.linalg.norm(params[name]))
    expected = update / max(1.0, np.linalg.norm(update) / upper)
    np.testing.assert_allclose(clipped[name], expected, rtol=1e-6)


def test_excluded_leaves_pass():
  seen = []
  exclude = lambda path: seen.append(path) or path == 'out/w'
  updates, _ = run(nfnet_jax.agc(1e-4, exclude=exclude))
  assert set(seen) == {'conv/b', 'conv/w', 'out/w'}
  assert updates['out']['w'] is GRADS['out']['w']
  desired, _ = run(optax.adaptive_grad_clip(1e-4))
  assert_same(updates['conv'], desired['conv'])


def test_if_all_is_excluded_the_fraction_is_zero():
  tx = nfnet_jax.agc(exclude=lambda path: True, group_fn=lambda path: path)
  updates, state = run(tx)
  assert_same(updates, GRADS)
  assert state.clipped == 0
  assert state.clipped_by_group == {}


@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit], ids=['eager', 'jit'])
def test_fractions_of_a_small_example(wrap):
  """Weights are 1: a unit is clipped if its gradients are 0.5 or more."""
  grads = {
    'conv': {
      'b': jnp.full((4,), 0.1),  # 0 of 1 unit.
      'w': jnp.full((2, 2, 1, 2), jnp.array([0.5, 0.6])),  # 2 of 2.
    },
    'fc': {
      'b': jnp.full((3,), 0.9),  # 1 of 1.
      'w': jnp.full((3, 2), jnp.array([9.0, 0.1])),  # 1 of 2.
    },
    'gain': jnp.array(7.0),  # 1 of 1.
    'head': {'b': jnp.ones(5), 'w': jnp.ones((3, 5))},  # Excluded.
    'skip': {'gain': jnp.array(0.4)},  # 0 of 1.
  }
  params = jax.tree.map(jnp.ones_like, grads)
  tx = nfnet_jax.agc(
    0.5,
    exclude=lambda path: path.startswith('head'),
    group_fn=lambda path: path.rsplit('/', 1)[-1],
  )
  _, state = run(tx, grads, params, wrap(tx.update))
  assert state.clipped == 5 / 8
  assert state.clipped_by_group == {'b': 1 / 2, 'gain': 1 / 2, 'w': 3 / 4}
  assert run(nfnet_jax.agc(0.5), grads, params)[1].clipped_by_group == {}


def test_groups_of_nnx_are_the_same_at_init_and_update():
  network = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  tx = nfnet_jax.agc(1e-6, group_fn=lambda path: path)
  optimizer = nnx.Optimizer(network, tx, wrt=nnx.Param)
  loss_of = lambda network: jnp.sum(network(jnp.ones((1, 3))))
  optimizer.update(network, nnx.grad(loss_of)(network))
  groups = optimizer.opt_state.clipped_by_group
  assert {name: float(share) for name, share in groups.items()} == {
    'bias': 1.0,
    'kernel': 1.0,
  }


def test_missing_params_are_an_error():
  tx = nfnet_jax.agc()
  with pytest.raises(ValueError, match=r'update\(updates, state, params\)'):
    tx.update(GRADS, tx.init(PARAMS))


def fail(grad, param, **options):
  with pytest.raises(ValueError) as error:
    run(nfnet_jax.agc(**options), {'a': {'b': [grad]}}, {'a': {'b': [param]}})
  return str(error.value)


def test_errors_name_the_leaf():
  ones = jnp.ones
  message = fail(ones((3, 2)), ones((2, 3)))
  assert all(part in message for part in ("'a/b/0'", '(3, 2)', '(2, 3)'))
  # Without the check, these shapes would broadcast.
  assert "'a/b/0'" in fail(ones((3, 2)), ones((1, 2)))
  message = fail(ones((3, 2)), None)
  assert all(part in message for part in ("'a/b/0'", '(3, 2)', 'None'))
  message = fail(ones((3, 2)), ones((3, 2)), axes=lambda path, shape: (2,))
  assert all(part in message for part in ("'a/b/0'", '(3, 2)', '(2,)'))


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'clipping': '0.01'}, "clipping must be a number, not '0.01'"),
    ({'clipping': -0.01}, 'clipping must be at least 0, not -0.01'),
    ({'clipping': float('nan')}, 'clipping must be at least 0, not nan'),
    ({'eps': -1}, 'eps must be at least 0, not -1'),
    ({'exclude': 'head'}, "exclude must be a function of a path.*not 'head'"),
    ({'group_fn': ['a']}, "group_fn must be a function of a path.*not ..a'"),
  ],
)
def test_wrong_argument_is_named(arguments, message):
  with pytest.raises(ValueError, match=f'^agc: {message}'):
    nfnet_jax.agc(**arguments)


@pytest.mark.parametrize('axes', ['output_middle', '', 0, (), [0, 1], False])
def test_unknown_axes_list_the_known_ones(axes):
  with pytest.raises(ValueError, match='output_last or output_first') as error:
    nfnet_jax.agc(axes=axes)
  assert repr(axes) in str(error.value)
