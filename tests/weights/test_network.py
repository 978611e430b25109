"""A trained network predicts what images show."""

import pickle

import jax
import numpy as np
from PIL import Image
import pytest

import nfnet_jax
from nfnet_jax import images
from nfnet_jax.models import inputs
from nfnet_jax.models.fast import convolutions
from nfnet_jax.weights import inference
from tests import trained_weights


@pytest.fixture(scope='module')
def weights():
  _, weights = trained_weights.random_weights('nfnet_pico', margin=5)
  return trained_weights.decisive(weights)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  folder = tmp_path_factory.mktemp('photos')
  trained_weights.write_photos(folder, 5)
  return sorted(folder.iterdir())


@pytest.fixture(scope='module')
def probabilities_of(weights):
  """Return `pixels [S, S, 3] -> probabilities [num_classes]` of the model."""
  apply = jax.jit(weights.create().apply, static_argnums=4)

  def compute(pixels):
    image = inputs.normalize_images(pixels[None])
    logits, _ = apply(weights.params, weights.model_state, None, image, False)
    powers = np.exp(np.float64(logits[0]))
    return powers / powers.sum()

  return compute


def test_predictions_are_those_of_the_model(weights, photos, probabilities_of):
  rows = weights.predict(photos, top=3)
  assert len(rows) == 5
  for row, photo in zip(rows, photos):
    expected = probabilities_of(weights.preprocess(photo))
    order = np.argsort(-expected)[:3].tolist()
    assert [label for label, _, _ in row] == order
    assert [guess.name for guess in row] == [
      weights.class_names[label] for label in order
    ]
    np.testing.assert_allclose(
      [guess.probability for guess in row], expected[order], rtol=1e-3
    )


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('nfnet_pico', {'timm_forward': True}),
    pytest.param('eca_nfnet_pico', {}, marks=pytest.mark.slow),
    pytest.param('nf_regnet_pico', {}, marks=pytest.mark.slow),
    pytest.param('efficientnet_pico', {}, marks=pytest.mark.slow),
  ],
)
def test_kernels_are_standardised_and_split_once(name, options, monkeypatch):
  _, weights = trained_weights.random_weights(name, options=options)
  model = weights.create()
  pixels = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3))
  pixels = np.float32(pixels)
  expected, _ = jax.jit(model.endpoints, static_argnums=4)(
    weights.params,
    weights.model_state,
    None,
    inputs.normalize_images(pixels),
    False,
  )
  predictor = inference.Predictor(weights)
  if not weights.model_state:  # Batch normalisation computes a root, too.
    monkeypatch.setattr(jax.lax, 'rsqrt', None)
    monkeypatch.setattr(convolutions, 'split_kernel', None)
  outputs = predictor(pixels, 2)
  scale = np.abs(expected['features']).max()
  np.testing.assert_allclose(
    outputs['features'], expected['features'], rtol=0, atol=1e-5 * scale
  )
  np.testing.assert_allclose(
    outputs['probabilities'], jax.nn.softmax(expected['logits']), atol=1e-4
  )


def test_one_image_or_several_of_any_kind(weights, photos):
  (expected,) = weights.predict(photos[0])
  assert len(expected) == 5
  pixels = images.read_image(photos[0])
  several = [str(photos[0]), pixels, Image.open(photos[0])]
  for given in (pixels, Image.open(photos[0]), several, pixels[None]):
    for row in weights.predict(given):
      assert [guess.label for guess in row] == [
        guess.label for guess in expected
      ]
      assert row[0].probability == pytest.approx(expected[0].probability, 1e-3)
  assert weights.predict([]) == []


def test_more_images_than_a_batch(weights, photos):
  rows = weights.predict(7 * photos)
  assert len(rows) == 35
  labels = [[guess.label for guess in row] for row in rows]
  assert labels == 7 * labels[:5]


def test_weights_by_path(weights, photos, tmp_path):
  (tmp_path / 'w').write_bytes(pickle.dumps(weights.params))
  (row,) = nfnet_jax.predict(tmp_path / 'w', photos[0], top=1)
  (guess,) = row
  loaded = nfnet_jax.load_weights(tmp_path / 'w')
  assert loaded.predict([photos[0]])[0][0] == guess


def test_an_image_that_cannot_be_read_is_named(weights, photos, tmp_path):
  (tmp_path / 'bad.png').write_bytes(b'no')
  with pytest.raises(images.ImageError, match=r'bad\.png. cannot be read'):
    weights.predict([photos[0], tmp_path / 'bad.png'])
