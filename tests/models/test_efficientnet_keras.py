"""EfficientNet against `keras.applications`, with Keras's random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnet_jax.models import complexity, registry

# Keras layer suffix -> module and parameter names here.
LAYERS = {
  'expand_conv': 'expand_conv',
  'expand_bn': 'expand_bn',
  'dwconv': 'depthwise_conv',
  'bn': 'depthwise_bn',
  'se_reduce': 'squeeze_excite/~/linear',
  'se_expand': 'squeeze_excite/~/linear_1',
  'project_conv': 'project_conv',
  'project_bn': 'project_bn',
}
OUTER = {
  'stem_conv': 'stem_conv',
  'stem_bn': 'stem_bn',
  'top_conv': 'final_conv',
  'top_bn': 'final_bn',
  'predictions': 'linear',
}


def module_paths(keras_model):
  """Map Keras layer names to module paths; blocks are numbered in order."""
  paths, blocks = {}, []
  for layer in keras_model.layers:
    prefix, _, suffix = layer.name.partition('_')
    if layer.name in OUTER:
      paths[layer.name] = f'EfficientNet/~/{OUTER[layer.name]}'
    elif prefix.startswith('block') and suffix in LAYERS:
      if prefix not in blocks:
        blocks.append(prefix)
      number = blocks.index(prefix)
      block = 'mb_conv' + (f'_{number}' if number else '')
      paths[layer.name] = f'EfficientNet/~/{block}/~/{LAYERS[suffix]}'
  return paths


def convert(keras_model):
  """Return Keras's weights as this package's parameters and state."""
  params: dict[str, dict] = {}
  state: dict[str, dict] = {}
  for name, path in module_paths(keras_model).items():
    values = [np.asarray(w) for w in keras_model.get_layer(name).weights]
    if name.endswith('bn'):
      scale, offset, mean, var = (v.reshape(1, 1, 1, -1) for v in values)
      params[path] = {'scale': scale, 'offset': offset}
      for kind, value in (('mean', mean), ('var', var)):
        state[f'{path}/~/{kind}_ema'] = {
          'average': value,
          'hidden': value,
          'counter': np.int32(1),
        }
    elif name.endswith('dwconv'):
      params[path] = {'w': values[0].transpose(0, 1, 3, 2)}
    elif len(values) == 2:
      kernel, bias = values
      params[path] = {'w': kernel.reshape(kernel.shape[-2:]), 'b': bias}
    else:
      params[path] = {'w': values[0]}
  return params, state


def randomize(keras_model, images):
  """Give normalisations random weights, and the statistics of some images.

  With other statistics signals grow with depth, and rounding errors with them.
  """
  rng = np.random.default_rng(0)
  for layer in keras_model.layers:
    if not layer.name.endswith('bn'):
      continue
    layer.momentum = 0.0  # The batch's statistics replace the old ones.
    scale, offset, mean, var = layer.get_weights()
    scale = np.exp(0.2 * rng.normal(size=scale.shape))
    offset = 0.2 * rng.normal(size=offset.shape)
    layer.set_weights([scale, offset, mean, var])
  keras_model(images, training=True)


def check_parity(variant, size):
  import keras  # Imports TensorFlow, which is slow.
  import tensorflow as tf

  keras.utils.set_random_seed(0)
  make = getattr(keras.applications, f'EfficientNet{variant.upper()}')
  theirs = make(
    weights=None, input_shape=(size, size, 3), classifier_activation=None
  )
  images = np.random.default_rng(1).normal(size=(2, size, size, 3))
  randomize(theirs, 255 * images)  # Keras divides by 255 itself.
  params, state = convert(theirs)
  trainable = sum(np.size(w) for w in theirs.trainable_weights)
  assert complexity.count_parameters(params) == trainable
  expected = np.asarray(theirs(255 * images, training=False))
  model = registry.create_model(f'efficientnet_{variant}')
  apply = jax.jit(lambda p, s, x: model.apply(p, s, None, x, False)[0])
  logits = apply(params, state, jnp.asarray(images, jnp.float32))
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
  keras.backend.clear_session()
  tf.random.set_seed(None)


@pytest.mark.slow
def test_b0_equals_keras():
  check_parity('b0', 91)


@pytest.mark.full
@pytest.mark.parametrize('index', range(8))
def test_equals_keras_at_native_size(index):
  variant = f'b{index}'
  spec = registry.get_model_spec(f'efficientnet_{variant}')
  check_parity(variant, spec.test_size)
