"""Folded networks give the logits of the trained ones."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nfnet_jax
from nfnet_jax.export import fold
from nfnet_jax.models import batch_norm, layers, registry
from tests.models import reference
from tests.trained_weights import randomize

# Number of standardised kernels, of merged norms, and of norms that are kept.
COUNTS = {
  'nfnet_pico': (25, 0, 0),
  'nfnet_pico_bn': (0, 17, 3),
  'eca_nfnet_pico': (25, 0, 0),
  'nf_resnet_pico': (20, 0, 0),
  'nf_regnet_pico': (21, 0, 0),
  'fixup_resnet_pico': (0, 0, 0),
  'skipinit_resnet_pico': (0, 0, 0),
  'bn_resnet_pico': (0, 10, 6),
  'senet_pico': (0, 20, 0),
  'efficientnet_pico': (0, 25, 0),
}
# One with standardised kernels; one with merged norms and ones that are kept.
QUICK = {'nfnet_pico', 'bn_resnet_pico'}


def check(model, params, state, folded):
  """Compare logits, and check what the tree contains."""
  images = np.float32(reference.random_images(3, 32, 32, 3))
  call = jax.jit(lambda p, s, x: model.apply(p, s, None, x, False)[0])
  expected = call(params, state, images)
  actual = jax.jit(folded.apply)(folded.params, images)
  atol = 2e-6 * np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)
  assert np.std(expected[0] - expected[1]) > 1e-3  # The images matter.
  assert set(folded.params) == set(params) - set(folded.merged)
  for path, leaves in folded.params.items():
    assert all(type(leaf) is np.ndarray for leaf in leaves.values())
    assert all(leaf.dtype == np.float32 for leaf in leaves.values())
    if path in folded.kept:
      assert set(leaves) == {'scale', 'offset'}
      assert all(leaf.ndim == 1 for leaf in leaves.values())
    elif leaves.get('w', np.zeros(())).ndim == 4:
      assert set(leaves) <= {'w', 'b'}
      assert leaves['w'].shape == params[path]['w'].shape
    else:
      jax.tree.map(np.testing.assert_array_equal, leaves, dict(params[path]))


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in COUNTS
  ],
)
def test_every_family(name):
  model = nfnet_jax.create(name, 10)
  params, state = randomize(model)
  folded = fold.fold(model, params, state)
  check(model, params, state, folded)
  counts = tuple(map(len, (folded.standardized, folded.merged, folded.kept)))
  assert counts == COUNTS[name]
  norms = {path.rsplit('/~/', 1)[0] for path in state}
  assert {*folded.merged, *folded.kept} == norms


@pytest.mark.slow
@pytest.mark.parametrize('name', ['nfnet_pico_bn', 'efficientnet_pico'])
def test_fast_convolutions(name):
  model = nfnet_jax.create(name, 10, fast_convs=True)
  params, state = randomize(model)
  check(model, params, state, fold.fold(model, params, state))


def test_standardisation_of_timm():
  standardize = layers.standardize_as_timm
  model = network(
    lambda x: jnp.mean(
      layers.ScaledWSConv2D(4, 3, standardize=standardize)(x), (1, 2)
    )
  )
  params, state = randomize(model)
  check(model, params, state, fold.fold(model, params, state))


@pytest.mark.slow
def test_standardisation_of_timms_network():
  model = nfnet_jax.create('nfnet_pico', 10, timm_forward=True)
  params, state = randomize(model)
  check(model, params, state, fold.fold(model, params, state))


def test_difference_is_rounding_or_more():
  model = nfnet_jax.create('bn_resnet_pico', 10)
  params, state = randomize(model)
  folded = fold.fold(model, params, state)
  assert 0 < fold.difference(model, params, state, folded, 32) < 2e-6
  folded.params['ResNet/~/final_bn']['offset'] += 1e-3
  assert fold.difference(model, params, state, folded, 32) > 1e-5
  folded.params['ResNet/~/final_bn']['offset'] += np.nan
  assert np.isnan(fold.difference(model, params, state, folded, 32))


def test_no_family_is_left_out():
  picos = {name for name in nfnet_jax.list_models() if 'pico' in name}
  assert set(COUNTS) == picos


def test_norms_after_sums_and_pools_are_kept():
  model = nfnet_jax.create('bn_resnet_pico', 10)
  kept = fold.fold(model, *randomize(model)).kept
  assert {path.rsplit('/', 1)[1] for path in kept} == {'bn0', 'final_bn'}


def test_kernels_are_those_of_float64():
  model = nfnet_jax.create('nfnet_pico', 10)
  params, state = randomize(model)
  folded = fold.fold(model, params, state).params
  for path in ('NFNet/~/stem_conv1', 'NFNet/~/nf_block_1/~/conv1'):
    w, gain, bias = (
      np.float64(params[path][name]) for name in ('w', 'gain', 'bias')
    )
    variance = w.var((0, 1, 2)) * np.prod(w.shape[:3])
    scale = gain / np.sqrt(np.maximum(variance, 1e-4))
    assert variance.min() < 1e-4 < variance.max()
    expected = np.float32((w - w.mean((0, 1, 2))) * scale)
    np.testing.assert_array_max_ulp(folded[path]['w'], expected, 1)
    np.testing.assert_array_equal(folded[path]['b'], np.float32(bias))


def network(forward):
  """Return a model that computes a function of images."""
  make = lambda images, is_training: forward(images)
  spec = registry.ModelSpec('toy', hk.Module, '', 32, 32, 'squash')
  return registry.Model(*hk.transform_with_state(make), None, spec)


def conv(name, **options):
  return hk.Conv2D(4, 3, name=name, **{'with_bias': False, **options})


def norm(x, name):
  return batch_norm.BatchNorm(name=name, eps=0.1)(x, False)


def merged(x):
  """Every case in which a norm is merged."""
  x = norm(conv('plain')(x), 'a')
  x = norm(conv('biased', with_bias=True)(x), 'b')
  x = norm(conv('grouped', feature_group_count=2)(x), 'c')
  return norm(layers.ScaledWSConv2D(4, 1, name='standardized')(x), 'd')


def shared_with_a_shortcut(x):
  x = conv('first')(x)
  return x + norm(x, 'a')


def used_by_two_norms(x):
  x = conv('first')(x)
  return norm(x, 'a') + norm(x, 'b')


def not_directly(x):
  x = norm(jax.nn.relu(conv('first')(x)), 'a')
  return norm(layers.max_pool(conv('second')(x)), 'b')


def after_another(x):
  return norm(norm(conv('first')(x), 'a'), 'b')


def before(x):
  return conv('first', with_bias=True)(norm(x, 'a'))


@pytest.mark.parametrize(
  ('forward', 'expected'),
  [
    (merged, 'abcd'),
    (shared_with_a_shortcut, ''),
    (used_by_two_norms, ''),
    (not_directly, ''),
    (after_another, 'a'),
    (before, ''),
  ],
)
def test_which_norm_follows_which_convolution(forward, expected):
  model = network(lambda x: jnp.mean(forward(x), (1, 2)))
  params, state = randomize(model)
  folded = fold.fold(model, params, state)
  assert sorted(folded.merged) == list(expected)
  check(model, params, state, folded)


def test_an_output_of_the_network_is_not_rescaled():
  def forward(x):
    x = conv('first')(x)
    norm(x, 'a')
    return x

  model = network(forward)
  params, state = randomize(model)
  folded = fold.fold(model, params, state)
  assert folded.kept == ('a',)
  check(model, params, state, folded)


def test_a_module_that_is_called_twice_is_refused():
  def forward(x):
    module = hk.Conv2D(3, 3, name='shared')
    return module(module(x))

  model = network(forward)
  with pytest.raises(ValueError, match="'shared' is called twice"):
    fold.fold(model, *randomize(model))


def test_state_of_other_modules_is_refused():
  def forward(x):
    average = hk.ExponentialMovingAverage(0.9, name='average')(x)
    return conv('first')(x) + jnp.mean(average)

  model = network(forward)
  params, state = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), 0)
  with pytest.raises(ValueError, match=r"'average' .* batch norm"):
    fold.fold(model, params, state)
