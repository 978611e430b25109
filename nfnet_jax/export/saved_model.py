"""Export a folded network as a TensorFlow SavedModel.

This is the only file that imports both JAX and TensorFlow.
"""

from __future__ import annotations

import pathlib

import jax
from jax.experimental import jax2tf
import numpy as np
import tensorflow as tf

from nfnet_jax.export import stablehlo


def check() -> None:
  """Check that the installed TensorFlow reads what the installed JAX writes.

  TensorFlow reads StableHLO up to its own version. JAX writes a version that
  may be only four weeks old.

  Raises:
    ValueError: if TensorFlow is too old.
  """
  probe = jax2tf.convert(lambda x: x + 1, polymorphic_shapes=['batch'])
  try:
    probe(tf.zeros(1))
  except tf.errors.OpError as error:
    raise ValueError(
      f'TensorFlow {tf.__version__} is too old for the programs of JAX '
      f'{jax.__version__}. Leave --saved_model out, or install an older JAX.'
    ) from error


def save(
  path: pathlib.Path,
  predict: stablehlo.Predict,
  weights: dict[str, np.ndarray],
  size: int,
) -> None:
  """Write a SavedModel whose `predict` takes any number of images.

  `predict` and the signature `serving_default` map `images [N, size, size, 3]`,
  float pixels in 0..255, to `{'probabilities': [N, classes]}`.

  Args:
    path: a folder that does not exist.
    predict: see `stablehlo.predictor`.
    weights: its first argument.
    size: side of its images, in pixels.
  """
  convert = jax2tf.convert(
    predict,
    polymorphic_shapes=[None, 'batch, ...'],
    with_gradient=False,
    native_serialization_platforms=stablehlo.PLATFORMS,
  )
  module = tf.Module()
  # As variables, because the graph cannot hold 2 GB.
  module.weights = {
    name: tf.Variable(leaf, trainable=False) for name, leaf in weights.items()
  }
  images = tf.TensorSpec([None, size, size, 3], tf.float32, 'images')
  module.predict = tf.function(
    lambda images: {'probabilities': convert(module.weights, images)},
    input_signature=[images],
    autograph=False,
  )
  tf.saved_model.save(module, str(path), {'serving_default': module.predict})
