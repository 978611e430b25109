"""ONNX models give the probabilities of the folded networks."""

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

from nfnet_jax.export import fold, onnx_file, onnx_graph, stablehlo
from nfnet_jax.models import layers, registry
from tests.models import families, reference
from tests.trained_weights import randomize


def run(model, images):
  session = onnxruntime.InferenceSession(
    model.SerializeToString(), providers=['CPUExecutionProvider']
  )
  (outputs,) = session.run(None, {'images': images})
  return outputs


def make_network(name):
  """Return the function and the weights that are exported."""
  model = registry.create_model(name, 10)
  folded = fold.fold(model, *randomize(model))
  return stablehlo.predictor(folded), stablehlo.flatten(folded.params)


@pytest.mark.parametrize('name', families.picos(quick=('bn_resnet_pico',)))
@pytest.mark.parametrize('size', [32, pytest.param(45, marks=pytest.mark.slow)])
def test_network(name, size):
  """Of each family, with one and with several images, of odd sides too."""
  predict, weights = make_network(name)
  model = onnx_graph.convert(predict, weights, (size, size, 3))
  onnx.checker.check_model(model, full_check=True)
  for count in (1, 3):
    images = np.float32(
      100 + 50 * reference.random_images(count, size, size, 3)
    )
    expected = jax.jit(predict)(weights, images)
    actual = run(model, images)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
  assert np.ptp(actual, 0).max() > 1e-4  # The images matter.


@pytest.mark.parametrize('name', sorted(layers.ACTIVATIONS))
def test_activation(name):
  function = lambda weights, images: layers.ACTIVATIONS[name][0](images)
  model = onnx_graph.convert(function, {}, (3, 4, 6))
  images = 5 * np.float32(reference.random_images(2, 3, 4, 6))
  np.testing.assert_allclose(
    run(model, images), function({}, images), rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize(
  ('function', 'message'),
  [
    (lambda weights, x: jnp.sort(x, 1), "operation 'sort'"),
    (lambda weights, x: jnp.einsum('nhwc,nhkc->nhwk', x, x), 'product over'),
  ],
)
def test_unknown_operations_are_named(function, message):
  with pytest.raises(ValueError, match=message):
    onnx_graph.convert(function, {}, (3, 4, 6))


def test_large_weights_lie_beside_the_model(tmp_path, monkeypatch):
  monkeypatch.setattr(onnx_file, '_MAX_BYTES', 0)
  weights = {'w': np.random.default_rng(0).normal(size=(3, 999)).astype('f4')}
  predict = lambda weights, images: images.mean((1, 2)) @ weights['w'] / 1e6
  onnx_file.save(tmp_path / 'onnx', predict, weights, 8)
  names = {path.name for path in (tmp_path / 'onnx').iterdir()}
  assert names == {'model.onnx', 'model.onnx.data'}


def test_a_model_that_differs_is_refused(tmp_path, monkeypatch):
  monkeypatch.setitem(onnx_graph._SAME, 'add', 'Sub')
  predict = lambda weights, images: images.mean((1, 2)) + weights['b']
  with pytest.raises(ValueError, match='Leave --onnx out'):
    onnx_file.save(tmp_path / 'onnx', predict, {'b': np.float32(1)}, 8)
