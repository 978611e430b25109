"""The registry of models, activations and counts of multiply-adds."""

import dataclasses
import math

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnet_jax.models import (
  classifier,
  complexity,
  fast,
  layers,
  nfnet,
  registry,
)
from nfnet_jax.weights import identify
from tests.models import families, reference


@pytest.fixture(scope='module')
def small():
  """Return arguments of a small network."""
  with families.small_nfnet(depth=(1, 1, 0, 0)) as name:
    model = registry.create_model(name, num_classes=10)
    images = np.float32(reference.random_images(2, 32, 32, 3))
    init = lambda key: model.init(key, images, False)[0]
    params = jax.tree.map(jnp.float32, reference.random_params(init))
    yield model, params, {}, images


def test_endpoints_agree_with_the_forward_pass(small):
  model, params, state, images = small

  @jax.jit
  def both(*args):
    return model.apply(*args, False)[0], model.endpoints(*args, False)[0]

  logits, outputs = both(params, state, None, images)
  np.testing.assert_array_equal(outputs['logits'], logits)
  assert outputs['features'].shape == (2, 192)
  blocks = sorted(name for name in outputs if name.startswith('block_'))
  assert blocks == ['block_0', 'block_1']
  assert set(outputs['block_0']) == {'sq_mean', 'var', 'residual_var'}


def test_training_without_a_key_is_refused(small):
  model, params, state, images = small
  with pytest.raises(ValueError, match='RNG'):
    model.apply(params, state, None, images, True)


def test_reported_accuracy_is_the_papers():
  specs = [registry.get_model_spec(f'nfnet_f{index}') for index in range(8)]
  top1 = [spec.reported_top1 for spec in specs]
  assert top1 == [83.6, 84.7, 85.1, 85.7, 85.9, 86.0, 86.5, None]
  assert all(bool(spec.source) == bool(spec.reported_top1) for spec in specs)


def test_reported_accuracy_names_models_and_sources():
  specs = {
    name: registry.get_model_spec(name) for name in registry.list_models()
  }
  reported = {n: s.reported_top1 for n, s in specs.items() if s.reported_top1}
  assert len(reported) == 35
  assert reported['nfnet_f2_modified_width'] == 82.0
  assert reported['nfnet_f3_bn'] == 85.5
  assert reported['senet50'] == 79.4
  assert reported['efficientnet_b7'] == 84.7
  for name, spec in specs.items():
    source = "timm's results" if '_l' in name else 'arXiv 2102.06171, table '
    assert spec.source.startswith(source) == (name in reported)


def test_ablation_differs_from_nfnet_where_the_paper_says():
  for index, magnitude in enumerate((5, 10, 10, 15)):
    rows = {
      name: registry.get_model_spec(f'nfnet_f{index}_{name}')
      for name in ('baseline', 'modified_width', 'default_width', 'bn')
    }
    magnitudes = [row.augment_magnitude for row in rows.values()]
    assert magnitudes == [0, 0, magnitude, magnitude]
    sizes = {(row.train_size, row.test_size) for row in rows.values()}
    nfnet = registry.get_model_spec(f'nfnet_f{index}')
    assert sizes == {(nfnet.train_size, nfnet.test_size)}


def test_augmentation_follows_the_variant():
  names = [f'nfnet_f{index}' for index in range(5)]
  magnitudes = [registry.get_model_spec(n).augment_magnitude for n in names]
  assert magnitudes == [5, 10, 10, 15, 15]
  plus = registry.get_model_spec('nfnet_f1_plus')
  assert plus.augment_magnitude == 10
  assert (plus.train_size, plus.test_size) == (224, 320)


@pytest.mark.parametrize('name', families.PICOS)
def test_options_are_the_constructors_keywords(name):
  spec = registry.get_model_spec(name)
  options = spec.options
  assert set(classifier.REGULARIZATION) <= set(options)
  assert ('cross_replica_bn' in options) == spec.uses_batch_statistics
  assert not {'name', 'num_classes', 'variant', *fast.PATHS} & set(options)
  for option in options.values():
    assert option.type in (bool, int, float, str)
    assert option.default is None or isinstance(option.default, option.type)
    assert option.description[0].isupper()
    assert option.description.endswith('.')
    assert '. ' not in option.description


def test_options_of_an_nfnet():
  spec = registry.get_model_spec('nfnet_f0')
  assert spec.options['activation'] == registry.Option(
    str, 'gelu', 'Activation function, a key of `layers.ACTIVATIONS`.'
  )
  assert spec.options['dropout_rate'][:2] == (float, None)
  assert spec.options['timm_forward'] == registry.Option(
    bool, False, "Compute as timm's `dm_nfnet_*` do."
  )
  assert spec.fast_paths == set(fast.PATHS)
  assert registry.get_model_spec('nf_resnet50').fast_paths == frozenset()


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('nfnet_f9', {}, "'nfnet_f9'. Did you mean .*nfnet_f7"),
    ('vgg', {}, "'vgg'. Known models are nfnet_f0, "),
    ('nfnet_f0', {'se_ratio': 1.0}, r"\(NFNet\) .*'se_ratio'.* activation, "),
    ('nfnet_f0', {'width': 2}, "'width'.*timm_forward, fast_convs"),
    ('senet50', {'fast_stem': True}, 'ResNetV1.*stochdepth_rate'),
  ],
)
def test_unknown_names_and_options_are_explained(name, options, message):
  with pytest.raises(ValueError, match=message):
    registry.create_model(name, **options)


def test_create_is_create_model():
  assert registry.create is registry.create_model


class Gated(nfnet.NFNet):
  """A family outside of the package, with other sizes and one more option."""

  variants = {
    'small': dataclasses.replace(nfnet.VARIANTS['pico'], depth=(1, 0, 0, 0))
  }

  def __init__(
    self,
    num_classes: int = 1000,
    variant: str = 'small',
    *,
    gate: bool = False,
    name: str = 'Gated',
  ):
    """Create the modules.

    Args:
        num_classes: Size of the logits.
        variant: A key of `variants`.
        gate: Gate the input. It is multiplied by a
            parameter.
        name: Root of all parameter paths.
    """
    super().__init__(num_classes, variant, name=name)
    self.gate = gate

  def stem(self, images, is_training):
    if self.gate:
      images *= hk.get_parameter('gate', (), init=jnp.ones)
    return super().stem(images, is_training)


@pytest.fixture
def gated():
  yield registry.register_model(
    'gated', Gated, 'small', train_size=32, test_size=48
  )
  registry.unregister_model('gated')


def test_registered_model_is_known_by_name(gated):
  assert gated == registry.get_model_spec('gated')
  assert registry.list_models()[-1] == 'gated'
  assert gated.options == {
    'gate': registry.Option(bool, False, 'Gate the input.')
  }
  assert gated.fast_paths == frozenset()
  assert gated.preprocessing.size == 48
  assert gated.preprocessing.crop == 'squash'
  assert len(gated.expected_variance) == 1
  params, state = identify.abstract_trees('gated', 10, {})
  assert identify.identify(params, state) == ('gated', 10)
  params, state = identify.abstract_trees('gated', 10, {'gate': True})
  assert params['Gated']['gate'].shape == ()
  identify.check('gated', 10, {'gate': True}, (params, state))


def test_unregistered_model_is_unknown():
  known = registry.list_models()
  for _ in range(2):  # The name can be used again.
    registry.register_model(
      'other', Gated, 'small', train_size=32, test_size=32
    )
    registry.unregister_model('other')
  assert registry.list_models() == known
  with pytest.raises(ValueError, match="'other'"):
    registry.unregister_model('other')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'name': 'nfnet_f0'}, "'nfnet_f0' is taken by NFNet"),
    ({'variant': 'f0'}, "Gated has no variant 'f0'"),
    ({'test_size': 0}, 'size is 0'),
    ({'eval_crop': 'none'}, "crop is 'none'"),
  ],
)
def test_impossible_registration_is_refused(changes, message):
  arguments = {
    'name': 'other',
    'variant': 'small',
    'train_size': 32,
    'test_size': 32,
    **changes,
  }
  with pytest.raises(ValueError, match=message):
    registry.register_model(family=Gated, **arguments)
  assert 'other' not in registry.list_models()


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
