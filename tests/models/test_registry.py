import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nfnet_jax
from nfnet_jax.models import complexity, layers, registry


@pytest.fixture(scope='module')
def pico(pico_params):
  model = nfnet_jax.create('nfnet_pico', num_classes=10)
  images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
  return model, pico_params, {}, images


def test_endpoints_agree_with_the_forward_pass(pico):
  model, params, state, images = pico

  @jax.jit
  def both(*args):
    return model.apply(*args, False)[0], model.endpoints(*args, False)[0]

  logits, outputs = both(params, state, None, images)
  np.testing.assert_array_equal(outputs['logits'], logits)
  assert outputs['features'].shape == (2, 192)
  blocks = sorted(name for name in outputs if name.startswith('block_'))
  assert blocks == ['block_0', 'block_1', 'block_2', 'block_3']
  assert set(outputs['block_0']) == {'sq_mean', 'var', 'residual_var'}


def test_training_without_a_key_is_refused(pico):
  model, params, state, images = pico
  with pytest.raises(ValueError, match='RNG'):
    model.apply(params, state, None, images, True)


def test_reported_accuracy_is_the_papers():
  specs = [registry.get_spec(f'nfnet_f{index}') for index in range(8)]
  top1 = [spec.reported_top1 for spec in specs]
  assert top1 == [83.6, 84.7, 85.1, 85.7, 85.9, 86.0, 86.5, None]
  assert all(bool(spec.source) == bool(spec.reported_top1) for spec in specs)


def test_reported_accuracy_names_models_and_sources():
  specs = {name: registry.get_spec(name) for name in registry.list_models()}
  reported = {n: s.reported_top1 for n, s in specs.items() if s.reported_top1}
  assert len(reported) == 31
  assert reported['nfnet_f2_modified_width'] == 82.0
  assert reported['nfnet_f3_bn'] == 85.5
  assert reported['senet50'] == 79.4
  assert reported['efficientnet_b7'] == 84.7
  for name, spec in specs.items():
    assert spec.source.startswith('arXiv 2102.06171') == (name in reported)


def test_ladder_differs_from_nfnet_where_the_paper_says():
  for index, magnitude in enumerate((5, 10, 10, 15)):
    rows = {
      name: registry.get_spec(f'nfnet_f{index}_{name}')
      for name in ('baseline', 'modified_width', 'default_width', 'bn')
    }
    magnitudes = [row.augment_magnitude for row in rows.values()]
    assert magnitudes == [0, 0, magnitude, magnitude]
    sizes = {(row.train_size, row.test_size) for row in rows.values()}
    nfnet = registry.get_spec(f'nfnet_f{index}')
    assert sizes == {(nfnet.train_size, nfnet.test_size)}


def test_augmentation_follows_the_variant():
  names = [f'nfnet_f{index}' for index in range(5)]
  magnitudes = [registry.get_spec(n).augment_magnitude for n in names]
  assert magnitudes == [5, 10, 10, 15, 15]
  plus = registry.get_spec('nfnet_f1_plus')
  assert plus.augment_magnitude == 10
  assert (plus.train_size, plus.test_size) == (224, 320)


@pytest.mark.parametrize('name', sorted(layers.ACTIVATIONS))
def test_gamma_makes_unit_variance(name):
  """Quadrature on a fine grid; the published gammas are 0.1 % estimates."""
  z = np.linspace(-12, 12, 200_001)
  density = np.exp(-z * z / 2)
  density /= density.sum()
  g = layers.scaled_activation(name)
  if name in ('log_softmax', 'glu'):  # These couple the channels.
    y = np.asarray(g(jax.random.normal(jax.random.key(0), (512, 4096))))
    assert abs(np.std(y) - 1) < 2e-3
    return
  y = np.asarray(g(jnp.asarray(z, jnp.float32)), np.float64)
  variance = density @ y**2 - (density @ y) ** 2
  assert abs(np.sqrt(variance) - 1) < 1.1e-3


@pytest.mark.parametrize(
  ('name', 'exact'),
  [
    ('relu', math.sqrt(2 / (1 - 1 / math.pi))),
    ('gelu', 1.700917),
    ('silu', 1.787187),
    ('tanh', 1.592537),
    ('elu', 1.270843),
    ('sigmoid', 4.801313),
    ('softplus', 1.919126),
    ('selu', 1.0),
    ('relu6', 1.712859),
    ('leaky_relu', 1.704832),
    ('identity', 1.0),
  ],
)
def test_gamma_by_quadrature(name, exact):
  function, published = layers.ACTIVATIONS[name]
  assert abs(layers.gamma(function) / exact - 1) < 2e-6
  assert abs(published / exact - 1) < 1.1e-3


def test_unknown_activation_lists_the_known():
  with pytest.raises(ValueError, match=r"'swish'; known: .*silu"):
    layers.scaled_activation('swish')


def test_macs_of_convolutions_products_and_nested_functions():
  images = jax.ShapeDtypeStruct((2, 8, 8, 6), jnp.float32)
  kernel = jax.ShapeDtypeStruct((3, 3, 2, 9), jnp.float32)

  @jax.jit
  def function(images, kernel):
    out = jax.lax.conv_general_dilated(
      images,
      kernel,
      (2, 2),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=3,
    )
    return jnp.mean(out, (1, 2)) @ jnp.ones((9, 5))

  convolution = 2 * 4 * 4 * 9 * (3 * 3 * 2)
  product = 2 * 9 * 5
  macs = complexity.count_macs(function, images, kernel)
  assert macs == convolution + product
