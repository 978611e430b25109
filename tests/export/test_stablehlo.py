"""Programs and SavedModels give the probabilities of the trained network."""

import jax
from jax import export
import numpy as np
import pytest

from nfnet_jax.export import fold, saved_model, stablehlo
from nfnet_jax.models import inputs
from tests import trained_weights

IMAGES = np.random.default_rng(3).uniform(0, 255, (5, 32, 32, 3))
IMAGES = IMAGES.astype(np.float32)


@pytest.fixture(
  scope='module',
  params=[
    pytest.param('nfnet_pico', marks=pytest.mark.slow),
    'bn_resnet_pico',
  ],
)
def folded(request):
  """Return predictor, weights, and probabilities of the unfolded network."""
  model, trained = trained_weights.random_weights(request.param)
  logits, _ = jax.jit(lambda *args: model.apply(*args, False))(
    trained.params, trained.model_state, None, inputs.normalize_images(IMAGES)
  )
  network = fold.fold(model, trained.params, trained.model_state)
  weights = stablehlo.flatten(network.params)
  return stablehlo.predictor(network), weights, jax.nn.softmax(logits)


def test_program_survives_serialisation(folded):
  predict, weights, expected = folded
  exported = stablehlo.program(predict, weights, 32)
  loaded = export.deserialize(exported.serialize())
  assert loaded.platforms == ('cpu', 'cuda', 'tpu')
  for count in (1, 5):
    actual = loaded.call(weights, IMAGES[:count])
    np.testing.assert_allclose(actual, expected[:count], rtol=0, atol=1e-5)


def test_program_holds_no_weights(folded):
  predict, weights, _ = folded
  size = sum(leaf.nbytes for leaf in weights.values())
  assert len(stablehlo.program(predict, weights, 32).serialize()) < size / 2


def test_saved_model_runs_in_plain_tensorflow(folded, tmp_path):
  import tensorflow as tf

  try:
    saved_model.check()
  except ValueError as error:
    pytest.skip(str(error))
  predict, weights, expected = folded
  saved_model.save(tmp_path / 'model', predict, weights, 32)
  loaded = tf.saved_model.load(tmp_path / 'model')
  serve = loaded.signatures['serving_default']
  for count in (1, 5):
    for call in (loaded.predict, lambda images: serve(images=images)):
      actual = call(tf.constant(IMAGES[:count]))['probabilities']
      np.testing.assert_allclose(actual, expected[:count], rtol=0, atol=1e-5)
