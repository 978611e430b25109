"""The miniature of every family, and signals at initialisation."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnet_jax import trees
from nfnet_jax.models import batch_norm, classifier, layers, registry
from tests.models import families, reference


def create(name, shape, **options):
  """Return a model, random parameters far from initial ones, and state."""
  model = registry.create_model(name, 10, **options)
  init = lambda key: model.init(key, jnp.zeros(shape), False)
  params = reference.random_params(lambda key: init(key)[0], he_kernels=True)
  shapes = jax.eval_shape(init, jax.random.key(0))[1]
  state = reference.random_state(shapes)
  return model, *jax.tree.map(jnp.float32, (params, state))


@pytest.mark.parametrize('name', families.PICOS)
def test_rates_are_the_variants_unless_given(name):
  """Configurations leave them to the model by None."""
  spec = registry.get_model_spec(name)

  def rates(**options):
    found: list[classifier.ImageClassifier] = []
    hk.transform_with_state(
      lambda: found.append(spec.family(10, spec.variant, **options))
    ).init(None)
    stochdepth_rates = [block.stochdepth_rate for block in found[0].blocks]
    return found[0].dropout_rate, max(stochdepth_rates)

  variant = spec.family.variants[spec.variant]
  assert rates(dropout_rate=None)[0] == variant.dropout
  assert rates(dropout_rate=0.3, stochdepth_rate=0.0) == (0.3, 0.0)
  assert 0 < rates(stochdepth_rate=0.4)[1] < 0.4


@pytest.mark.parametrize('name', families.picos(quick=('bn_resnet_pico',)))
def test_gradients_reach_every_parameter(name):
  shape = (3, 41, 37, 3)
  model, params, state = create(name, shape, stochdepth_rate=0.0)
  images = jnp.float32(reference.random_images(*shape))
  # Batch statistics remove what EfficientNet's projections add to a channel.
  is_training = name != 'efficientnet_pico'

  def loss(params):
    key = jax.random.key(0)
    outputs, _ = model.endpoints(params, state, key, images, is_training)
    loss = jnp.sum(jnp.sin(outputs.pop('logits')))
    return loss, outputs

  grads, outputs = jax.jit(jax.grad(loss, has_aux=True))(params)
  for path, grad in trees.named_leaves(grads):
    assert np.isfinite(grad).all(), path
    assert np.abs(grad).max() > 1e-7, path
  assert outputs.pop('features').ndim == 2
  names = [f'block_{index}' for index in range(len(outputs))]
  assert sorted(outputs) == sorted(names)
  for statistics in outputs.values():
    assert set(statistics) == {'sq_mean', 'var', 'residual_var'}
    assert all(value.shape == () for value in statistics.values())


@pytest.mark.parametrize('name', families.picos(quick=('bn_resnet_pico',)))
def test_bfloat16_is_close_to_float32(name):
  """In training, where batch statistics would suffer most."""
  shape = (8, 47, 33, 3)
  model, params, state = create(name, shape, stochdepth_rate=0.0)
  images = jnp.float32(5 + reference.random_images(*shape))

  @jax.jit
  def apply(params, images):
    return model.apply(params, state, jax.random.key(0), images, True)

  exact, exact_state = apply(params, images)
  low = jax.tree.map(jnp.bfloat16, (params, images))
  rounded, low_state = apply(*low)
  assert rounded.dtype == jnp.bfloat16
  error = jnp.linalg.norm(rounded.astype(jnp.float32) - exact)
  assert error < 0.2 * jnp.linalg.norm(exact)
  for (path, ours), (_, theirs) in zip(
    trees.named_leaves(low_state), trees.named_leaves(exact_state)
  ):
    assert ours.dtype == theirs.dtype, path


@pytest.mark.slow
@pytest.mark.parametrize('name', ['efficientnet_pico', 'nfnet_pico_bn'])
def test_fast_convolutions_agree_with_batch_norm(name):
  shape = (4, 37, 32, 3)
  images = jnp.float32(reference.random_images(*shape))

  def gradients(**options):
    model, params, state = create(name, shape, **options)

    def loss(params):
      # In training some gradients are zero, and rounding is all that is left.
      logits, _ = model.apply(params, state, None, images, False)
      return jnp.sum(jnp.sin(logits)), logits

    return jax.jit(jax.grad(loss, has_aux=True))(params)

  plain, fast = gradients(), gradients(fast_convs=True)
  for (path, one), (_, other) in zip(
    trees.named_leaves(plain), trees.named_leaves(fast), strict=True
  ):
    assert np.linalg.norm(one - other) <= 1e-3 * np.linalg.norm(one), path
  np.testing.assert_allclose(plain[1], fast[1], rtol=1e-3, atol=1e-4)


def test_batch_norm_computes_statistics_in_float32():
  """In bfloat16 rounding would hide the variance here, and the decay."""

  def forward(x):
    return batch_norm.BatchNorm(decay_rate=0.999)(x, True)

  net = hk.transform_with_state(forward)
  x = jnp.bfloat16(16 + reference.random_images(64, 4, 4, 3))
  params, state = jax.jit(net.init)(None, x)
  y, state = jax.jit(net.apply)(params, state, None, x)
  assert y.dtype == jnp.bfloat16
  exact = np.float64(x)
  for name, value in (
    ('mean', exact.mean((0, 1, 2))),
    ('var', exact.var((0, 1, 2))),
  ):
    leaves = state[f'batch_norm/~/{name}_ema']
    assert leaves['average'].dtype == jnp.float32
    np.testing.assert_allclose(np.ravel(leaves['average']), value, rtol=1e-3)
    np.testing.assert_allclose(
      np.ravel(leaves['hidden']), 0.001 * value, rtol=1e-3
    )


@pytest.mark.parametrize(
  ('name', 'std'),
  [('nfnet_pico', 0.01), ('nfnet_pico_bn', 0.01), ('bn_resnet_pico', 0)],
)
def test_classifiers_start_from_published_distributions(name, std):
  model = registry.create_model(name, 1000)
  images = jnp.zeros((1, 32, 32, 3))

  @jax.jit
  def classifier_kernel(key):
    params, _ = model.init(key, images, False)
    root = next(iter(params)).split('/')[0]
    return params[f'{root}/~/linear']['w']

  kernel = np.asarray(classifier_kernel(jax.random.key(0)))
  np.testing.assert_allclose(kernel.std(), std, rtol=0.05)
  np.testing.assert_allclose(kernel.mean(), 0, atol=1e-3)


@pytest.mark.slow
def test_evaluation_before_training_is_finite():
  """Running variances start at 1 if initialisation evaluates."""
  model = registry.create_model('bn_resnet_pico', 10)
  images = jnp.float32(reference.random_images(2, 32, 32, 3))

  @jax.jit
  def run(key, images):
    params, state = model.init(key, jnp.zeros_like(images), False)
    outputs, _ = model.endpoints(params, state, None, images, False)
    return params, state, outputs

  params, state, outputs = run(jax.random.key(0), images)
  for module, leaves in state.items():
    average = 1 if module.endswith('var_ema') else 0
    expected = {'counter': 0, 'hidden': 0, 'average': average}
    for name, value in leaves.items():
      np.testing.assert_allclose(value, expected[name], rtol=1e-6)
  assert 0.01 < outputs['block_4']['var'] < 100
  # He initialisation, within five standard deviations of a sample's variance.
  kernel = params['ResNet/~/res_block_v2_3/~/conv1']['w']
  fan_in = 9 * kernel.shape[2]
  bound = 5 * np.sqrt(2 / kernel.size)
  assert abs(kernel.var() * fan_in / 2 - 1) < bound


def test_drop_connect_rescales_survivors():
  x, key = jnp.ones((4000, 1, 1, 1)), jax.random.key(0)
  positions = jnp.arange(4000)
  kept = layers.stochastic_depth(x, 0.2, key, positions)
  scaled = layers.stochastic_depth(x, 0.2, key, positions, rescale=True)
  assert set(np.unique(kept)) == {0, 1}
  np.testing.assert_allclose(scaled, kept / 0.8, rtol=1e-6)
  assert abs(float(kept.mean()) - 0.8) < 0.03


def signals(name, is_training, **options):
  """Return each block's statistics at initialisation, on noise of 224 px.

  Smaller images have less variance: zero padding is a larger part of them.
  """
  model = registry.create_model(name, 10, stochdepth_rate=0.0, **options)
  images = jax.random.normal(jax.random.key(1), (4, 224, 224, 3))

  @jax.jit
  def run(key, images):
    params, state = model.init(key, images[:1, :32, :32], False)
    return model.endpoints(params, state, key, images, is_training)[0]

  outputs = jax.device_get(run(jax.random.key(0), images))
  count = sum(name.startswith('block_') for name in outputs)
  return [outputs[f'block_{index}'] for index in range(count)]


def column(rows, name):
  return np.array([row[name] for row in rows])


def stages_of(rows, depth=(3, 4, 6, 3)):
  ends = np.cumsum(depth)
  return [rows[end - count : end] for end, count in zip(ends, depth)]


def test_signal_propagation_of_a_small_nf_resnet():
  """As below, with wide tolerances because it has few channels."""
  rows = signals('nf_resnet_pico', False, skip_gain=1.0)
  np.testing.assert_allclose(column(rows, 'residual_var'), 1, atol=0.3)
  expected = registry.get_model_spec('nf_resnet_pico').expected_variance
  assert expected is not None
  np.testing.assert_allclose(column(rows, 'var'), expected, atol=0.15)
  assert column(rows, 'sq_mean').max() < 0.05


@pytest.mark.full
def test_signal_propagation_of_nf_resnet50():
  """Residual branches keep unit variance; each block adds alpha^2."""
  rows = signals('nf_resnet50', False, skip_gain=1.0)
  np.testing.assert_allclose(column(rows, 'residual_var'), 1, atol=0.15)
  published = [(1.057, 1.141), (1.063, 1.182), (1.073, 1.267), (1.054, 1.125)]
  for stage, ends, sq_mean in zip(
    stages_of(rows), published, (0.001, 0.002, 0.005, 0.007)
  ):
    var = column(stage, 'var')
    np.testing.assert_allclose(var[[0, -1]], ends, atol=0.02)
    np.testing.assert_allclose(np.diff(var), 0.04, atol=0.01)
    assert column(stage, 'sq_mean').max() < 3 * sq_mean


@pytest.mark.full
def test_signal_propagation_of_bn_resnet50():
  """Each block adds the variance of a ReLU under He initialisation."""
  rows = signals('bn_resnet50', True)
  added = 1 - 1 / np.pi
  np.testing.assert_allclose(column(rows, 'residual_var'), added, atol=0.03)
  last = [stage[-1] for stage in stages_of(rows)]
  np.testing.assert_allclose(
    column(last, 'var'), (2.86, 3.42, 4.81, 2.73), rtol=0.02
  )
  np.testing.assert_allclose(
    column(last, 'sq_mean'), (1.34, 1.42, 2.14, 1.23), rtol=0.1
  )
  for stage in stages_of(rows):
    np.testing.assert_allclose(np.diff(column(stage, 'var')), added, atol=0.05)
