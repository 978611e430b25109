"""Export a folded network as a program that needs only JAX and NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from nfnet_jax import trees
from nfnet_jax.export import fold
from nfnet_jax.models import inputs

PLATFORMS = ('cpu', 'cuda', 'tpu')

Weights = Mapping[str, Any]
Predict = Callable[[Weights, jax.Array], jax.Array]


def flatten(params: fold.Params) -> dict[str, np.ndarray]:
  """Map '/'-joined names to arrays.

  Examples:
    >>> flatten({'net/~/linear': {'w': np.ones(3)}})
    {'net/~/linear/w': array([1., 1., 1.])}
  """
  return dict(trees.named_leaves(params))


def unflatten(weights: Weights) -> dict[str, dict[str, Any]]:
  """Undo `flatten`."""
  params: dict[str, dict[str, Any]] = {}
  for name, leaf in weights.items():
    path, _, last = name.rpartition('/')
    params.setdefault(path, {})[last] = leaf
  return params


def predictor(folded: fold.Folded) -> Predict:
  """Return a function `(weights, images) -> probabilities [N, classes]`.

  It takes `weights` as `flatten` returns them, and `images [N, H, W, 3]`, float
  pixels in 0..255.
  """

  def predict(weights: Weights, images: jax.Array) -> jax.Array:
    normalized = inputs.normalize_images(images)
    return jax.nn.softmax(folded.apply(unflatten(weights), normalized))

  return predict


def program(predict: Predict, weights: Weights, size: int) -> export.Exported:
  """Lower a predictor for `PLATFORMS`, with a symbolic batch size.

  The weights are an argument, so that the program is small for any network:
  its container holds at most 2 GB.

  Args:
    predict: see `predictor`.
    weights: its first argument, or the shapes of it.
    size: side of its images, in pixels.

  Examples:
    >>> double = lambda weights, images: images.mean((1, 2)) * weights['w']
    >>> exported = program(double, {'w': np.float32(2)}, size=4)
    >>> exported.call({'w': np.float32(2)}, jnp.ones((5, 4, 4, 3))).shape
    (5, 3)
  """
  (batch,) = export.symbolic_shape('batch')
  images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(weights)
  )
  return export.export(jax.jit(predict), platforms=PLATFORMS)(shapes, images)
