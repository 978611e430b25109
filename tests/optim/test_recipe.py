"""The optimiser of the paper, its groups, clipping rules and schedules."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nfnet_jax
from nfnet_jax import trees
from nfnet_jax.optim import agc, clipping, ema, groups

# One module of every kind, and the only one whose kernel is not clipped.
MODULES = (
  'NFNet/~/stem_conv0',
  'NFNet/~/nf_block_1',
  'NFNet/~/nf_block_1/~/conv0',
  'NFNet/~/nf_block_1/~/squeeze_excite/~/linear',
  'NFNet/~/linear',
)


@pytest.fixture(scope='module')
def params(pico_params):
  """Return some of a network's parameters; each shape is compiled for."""
  return {path: dict(pico_params[path]) for path in MODULES}


def random_like(tree, seed, scale):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda p: jnp.asarray(scale * rng.standard_normal(p.shape), p.dtype), tree
  )


def by_hand(path, grads, param, rates, momentum=0.9, decay=2e-5, ratio=0.01):
  """Section 4.1's update of one parameter, in float64 numpy."""
  name = path.rsplit('/', 1)[-1]
  is_classifier = path == 'NFNet/~/linear/w'
  param = np.asarray(param, np.float64)
  velocity = np.zeros_like(param)
  for grad, rate in zip(grads, rates):
    grad = np.asarray(grad, np.float64)
    if not is_classifier:
      axes = {4: (0, 1, 2), 2: (0,)}.get(param.ndim)
      norm = lambda x, a=axes: np.sqrt(np.sum(x * x, axis=a, keepdims=True))
      bound = ratio * np.maximum(norm(param), 1e-3)
      factor = bound / np.maximum(norm(grad), 1e-6)
      grad = np.where(norm(grad) < bound, grad, grad * factor)
      grad = grad.reshape(param.shape)
    if name == 'w':
      grad = grad + decay * param
    velocity = momentum * velocity + grad
    param = param - rate * (grad + momentum * velocity)
  return param


def test_chain_is_the_papers_update(params):
  # A gain starts at zero: `eps` is its bound.
  gain = {'NFNet/~/nf_block_1': {'skip_gain': jnp.zeros(())}}
  params = {**params, **gain}
  schedule = nfnet_jax.warmup_cosine(0.4, warmup_steps=2, total_steps=6)
  tx = nfnet_jax.make_optimizer(schedule)
  start, state = dict(trees.named_leaves(params)), tx.init(params)
  all_grads = [random_like(params, seed, 0.01) for seed in range(4)]
  update = jax.jit(tx.update)
  for grads in all_grads:
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
  rates = [0.0, 0.2, 0.4, 0.4 * 0.5 * (1 + math.cos(math.pi / 4))]
  named_grads = [dict(trees.named_leaves(grads)) for grads in all_grads]
  for path, param in trees.named_leaves(params):
    grads = [named[path] for named in named_grads]
    expected = by_hand(path, grads, start[path], rates)
    np.testing.assert_allclose(
      param, expected, rtol=2e-5, atol=2e-6, err_msg=path
    )


def test_momentum_is_nesterov_as_in_optax_sgd(params):
  ours = nfnet_jax.make_optimizer(0.1, weight_decay=0.0, clipping=0)
  theirs = optax.sgd(0.1, momentum=0.9, nesterov=True)
  states = ours.init(params), theirs.init(params)
  for seed in range(3):
    grads = random_like(params, seed, 1.0)
    a, state_a = ours.update(grads, states[0], params)
    b, state_b = theirs.update(grads, states[1], params)
    states = state_a, state_b
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_only_the_classifier_kernel_is_not_clipped(params):
  tx = nfnet_jax.make_optimizer(1.0, weight_decay=0.0, momentum=0.0)
  grads = random_like(params, 0, 1e3)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  kept = [
    path
    for (path, update), (_, grad) in zip(
      trees.named_leaves(updates), trees.named_leaves(grads)
    )
    if np.array_equal(update, -grad)
  ]
  assert kept == ['NFNet/~/linear/w']


def test_decay_reaches_kernels_only(params):
  tx = nfnet_jax.make_optimizer(1.0, weight_decay=0.5, momentum=0.0)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
  for path, update in trees.named_leaves(updates):
    assert bool(jnp.any(update != 0)) == path.endswith('/w'), path


@pytest.mark.parametrize(
  ('path', 'name'),
  [
    ('NFNet/~/linear/w', 'classifier kernel'),
    ('NFNet/~/linear/b', 'gains and biases'),
    ('NFNet/~/stem_conv0/w', 'kernels'),
    ('NFNet/~/stem_conv0/gain', 'gains and biases'),
    ('NFNet/~/nf_block_1/skip_gain', 'gains and biases'),
    ('NFNet/~/nf_block/~/squeeze_excite/~/linear/w', 'kernels'),
    ('NFNet/~/nf_block/~/squeeze_excite/~/linear_1/w', 'kernels'),
    ('NFNet/~/nf_block/~/squeeze_excite/~/linear_1/b', 'gains and biases'),
  ],
)
def test_groups(path, name):
  assert groups.group_of(path).name == name


def test_groups_of_f0_have_the_published_sizes():
  model = nfnet_jax.create('nfnet_f0')
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  params, _ = jax.eval_shape(
    lambda key, i: model.init(key, i, False), jax.random.key(0), images
  )
  rows = groups.group_table(params).splitlines()
  assert rows[2].split() == [
    'classifier',
    'kernel',
    '1',
    '3,072,000',
    'yes',
    'no',
  ]
  assert rows[3].split()[-3:] == ['113,492', 'no', 'yes']


@pytest.mark.parametrize(
  ('contains', 'message'),
  [
    (lambda path: False, "'net/odd' lies in no group"),
    (lambda path: True, "lies in 'gains and biases', 'mine'"),
  ],
)
def test_parameter_in_no_group_or_in_two_is_an_error(contains, message):
  mine = groups.Group('mine', contains, decay=True, clip=True)
  declared = (*groups.NFNET_GROUPS, mine)
  params = {'net': {'odd': jnp.ones(3), 'b': jnp.ones(3)}}
  if contains('net/odd'):
    params = {'net': {'b': jnp.ones(3)}}
  tx = nfnet_jax.make_optimizer(0.1, groups=declared)
  with pytest.raises(ValueError, match=message):
    tx.init(params)
  with pytest.raises(ValueError, match=message):
    groups.group_table(params, declared)


def test_published_schedule():
  total = 1_281_167 * 360 // 4096
  warmup = 5 * 1_281_167 / 4096
  schedule = nfnet_jax.warmup_cosine(1.6, warmup, total)
  assert total == 112_602
  assert float(schedule(0)) == 0
  np.testing.assert_allclose(schedule(782), 1.6 * 782 / warmup, rtol=1e-6)
  middle = round((warmup + total) / 2)
  np.testing.assert_allclose(schedule(middle), 0.8, rtol=1e-4)
  assert abs(float(schedule(total))) < 1e-7
  rates = jax.vmap(schedule)(jnp.arange(total + 1))
  assert int(jnp.argmax(rates)) in (1563, 1564)


def test_ema_warms_up_and_keeps_its_limit():
  average, values = {'w': jnp.zeros(3)}, {'w': jnp.ones(3)}
  first = ema.update_ema(average, values, 0.99999, jnp.int32(0))
  np.testing.assert_allclose(first['w'], 0.9, rtol=1e-6)
  np.testing.assert_allclose(ema.ema_decay(0.99999, 90), 0.91, rtol=1e-6)
  late = ema.ema_decay(0.99999, 10_000_000)
  np.testing.assert_allclose(late, 0.99999, rtol=1e-7)


def clipped_by(kind, params, grads, **options):
  tx = nfnet_jax.make_optimizer(
    1.0, momentum=0.0, weight_decay=0.0, clip_by=kind, **options
  )
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  return dict(trees.named_leaves(jax.tree.map(jnp.negative, updates)))


@pytest.mark.parametrize(
  ('kind', 'axes'), [('unit', 0), ('input_unit', 1), ('layer', (0, 1))]
)
def test_ratio_rules_bound_their_ratio(params, kind, axes):
  grads = random_like(params, 0, 1.0)
  clipped = clipped_by(kind, params, grads)
  whole = dict(trees.named_leaves(grads))
  (path,) = [p for p in clipped if p.endswith('nf_block_1/~/conv0/w')][:1]
  param = np.asarray(dict(trees.named_leaves(params))[path])
  as_matrix = lambda x: np.asarray(x, np.float64).reshape(-1, x.shape[-1])
  norm = lambda x: np.sqrt(np.sum(as_matrix(x) ** 2, axis=axes, keepdims=True))
  if kind == 'input_unit':  # Its units are the slices of axis 0.
    norm = lambda x: np.sqrt(np.sum(np.square(x, dtype=np.float64), (1, 2, 3)))
  np.testing.assert_allclose(norm(clipped[path]), 0.01 * norm(param), rtol=1e-5)
  classifier = 'NFNet/~/linear/w'
  np.testing.assert_array_equal(clipped[classifier], whole[classifier])


def test_global_norm_bounds_all_gradients_together(params):
  grads = random_like(params, 0, 1.0)
  clipped = clipped_by('global_norm', params, grads, clipping=3.0)
  assert float(optax.tree.norm(clipped)) == pytest.approx(3.0, rel=1e-5)
  by_default = clipped_by('global_norm', params, grads)
  assert float(optax.tree.norm(by_default)) == pytest.approx(1.0, rel=1e-5)
  small = random_like(params, 0, 1e-6)
  same = clipped_by('global_norm', params, small, clipping=3.0)
  for path, grad in trees.named_leaves(small):
    np.testing.assert_array_equal(same[path], grad)


def test_layer_wise_rates_are_those_of_lars(params):
  tx = nfnet_jax.make_optimizer(
    1.0, momentum=0.0, weight_decay=0.0, clipping=0, trust_coefficient=0.1
  )
  grads = random_like(params, 0, 1.0)
  updates, _ = tx.update(grads, tx.init(params), params)
  named = [dict(trees.named_leaves(t)) for t in (updates, grads, params)]
  for path, update in named[0].items():
    grad, param = named[1][path], named[2][path]
    ratio = 0.1 * jnp.linalg.norm(param) / jnp.linalg.norm(grad)
    expected = grad * (ratio if path.endswith('/w') else 1)
    np.testing.assert_allclose(update, -expected, rtol=1e-5, err_msg=path)


@pytest.mark.parametrize('name', clipping.RULES)
def test_clipping_of_0_is_none(params, name):
  grads = random_like(params, 0, 1e3)
  same = clipped_by(name, params, grads, clipping=0)
  for path, grad in trees.named_leaves(grads):
    np.testing.assert_array_equal(same[path], grad)


def test_traced_clipping_is_allowed(params):
  grads = random_like(params, 0, 1.0)
  traced = jax.jit(
    lambda ratio: clipped_by('unit', params, grads, clipping=ratio)
  )
  expected = clipped_by('unit', params, grads, clipping=0.02)
  for path, grad in traced(0.02).items():
    np.testing.assert_allclose(grad, expected[path], rtol=1e-5)


def test_a_rule_is_added_in_one_place(params, monkeypatch):
  halve = lambda bound, *_: optax.scale(bound)
  rule = clipping.ClippingRule('Halve all gradients.', 0.5, halve)
  monkeypatch.setitem(clipping.RULES, 'halve', rule)
  grads = random_like(params, 0, 1.0)
  halved = clipped_by('halve', params, grads)
  for path, grad in trees.named_leaves(grads):
    np.testing.assert_array_equal(halved[path], 0.5 * grad)


def test_clipped_units_are_counted_by_layer(params):
  tx = nfnet_jax.make_optimizer(0.1, clip_statistics='layer')
  _, state = jax.jit(tx.update)(params, tx.init(params), params)
  (counts,) = agc.states(state)
  # The classifier's bias is clipped, its kernel is not.
  assert set(counts.clipped_by_group) == set(MODULES)
  assert all(float(share) == 1 for share in counts.clipped_by_group.values())
  with pytest.raises(ValueError, match=r"'layers'; known: group, layer"):
    nfnet_jax.make_optimizer(0.1, clip_statistics='layers')


def test_unknown_rule_lists_the_known_ones():
  with pytest.raises(
    ValueError,
    match=r"'units'.*unit, input_unit, layer, global_norm.*mean 'unit'\?",
  ):
    nfnet_jax.make_optimizer(0.1, clip_by='units')


def test_global_norm_takes_no_schedule():
  with pytest.raises(ValueError, match=r"'global_norm' takes no schedule"):
    nfnet_jax.make_optimizer(
      0.1, clipping=optax.constant_schedule(1.0), clip_by='global_norm'
    )


def test_ema_copies_counters():
  state = {'counter': jnp.int32(3), 'hidden': jnp.float32(1)}
  later = {'counter': jnp.int32(4), 'hidden': jnp.float32(2)}
  moved = ema.update_ema(state, later, 0.99999, jnp.int32(0))
  assert moved['counter'].dtype == jnp.int32
  assert moved['counter'] == 4
  np.testing.assert_allclose(moved['hidden'], 1.9, rtol=1e-6)
