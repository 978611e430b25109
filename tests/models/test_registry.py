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
  if name == 'log_softmax':  # Couples the channels of an example.
    y = np.asarray(g(jax.random.normal(jax.random.key(0), (512, 4096))))
    assert abs(np.std(y) - 1) < 2e-3
    return
  y = np.asarray(g(jnp.asarray(z, jnp.float32)), np.float64)
  variance = density @ y**2 - (density @ y) ** 2
  assert abs(np.sqrt(variance) - 1) < 1.1e-3


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
