import jax
import pytest

from experiments.studies import networks
from nfnet_jax import trees
from nfnet_jax.models import registry

IMAGES = jax.ShapeDtypeStruct((2, 32, 32, 3), 'float32')


@pytest.fixture(scope='module', autouse=True)
def registered():
  networks.register()
  networks.register()
  yield
  networks.unregister()


def shapes(name, **options):
  model = registry.create_model(name, 10, **options)
  init = lambda key, images: model.init(key, images, False)
  params, _ = jax.eval_shape(init, jax.random.key(0), IMAGES)
  return {path: leaf.shape for path, leaf in trees.named_leaves(params)}


def test_whole_network_is_nfnet_nano():
  assert shapes('nfnet_parts_nano') == shapes('nfnet_nano')


@pytest.mark.parametrize(
  ('name', 'options', 'part'),
  [
    ('nfnet_parts_nano', {'branch_gain': False}, '/skip_gain'),
    ('nfnet_parts_nano', {'squeeze_excite': False}, '/squeeze_excite/'),
    ('nfnet_parts_nano_single', {}, '/conv1b/'),
  ],
)
def test_network_lacks_exactly_the_part(name, options, part):
  whole = shapes('nfnet_nano')
  assert any(part in path for path in whole)
  assert shapes(name, **options) == {
    path: shape for path, shape in whole.items() if part not in path
  }


@pytest.mark.slow
def test_activations_lack_gamma():
  features = {}
  for gamma in (True, False):
    model = registry.create_model('nfnet_parts_nano', 10, gamma=gamma)
    images = jax.random.normal(jax.random.key(1), IMAGES.shape)
    init = jax.jit(model.init, static_argnums=2)
    apply = jax.jit(model.apply, static_argnums=4)
    logits, _ = apply(
      *init(jax.random.key(0), images, False), None, images, False
    )
    features[gamma] = float(abs(logits).mean())
  assert features[True] > 2 * features[False]
