"""Weights as if trained, and a photo to try them on."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from nfnet_jax.models import registry
from nfnet_jax.weights import load
from tests.models import reference


def randomize(model: registry.Model):
  """Draws parameters and running statistics far from the initial ones."""
  images = jnp.zeros((1, 32, 32, 3))
  init = lambda key: model.init(key, images, False)
  shapes = jax.eval_shape(init, jax.random.key(0))[1]
  # Standardisation takes kernels of any scale.
  kind = {'he_kernels': True} if shapes else {'tiny_kernels': True}
  params = reference.random_params(lambda key: init(key)[0], **kind)
  state = reference.random_state(shapes)
  return jax.tree.map(lambda x: np.asarray(x, np.float32), (params, state))


def random_weights(name: str, **changes):
  """Returns a model of ten classes and its weights."""
  model = registry.create(name, 10)
  params, state = randomize(model)
  facts = {
    'num_classes': 10,
    'options': {},
    'class_names': [f'class {index}' for index in range(10)],
    'size': 32,
    'crop': model.spec.eval_crop,
    'margin': 4,
  }
  return model, load.Weights(params, state, name, **{**facts, **changes})


def draw_photo(path: pathlib.Path) -> None:
  """Writes a smooth picture, wider than high."""
  y, x = np.mgrid[:90, :140] / 20
  waves = [np.sin(x * (k + 1) + y * (3 - k) + k) for k in range(3)]
  pixels = np.uint8(127.5 + 120 * np.stack(waves, -1))
  Image.fromarray(pixels).save(path, quality=98)
