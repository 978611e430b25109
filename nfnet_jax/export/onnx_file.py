"""Export a folded network as an ONNX model, and check it in onnxruntime."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import onnx
import onnxruntime

from nfnet_jax.export import onnx_graph, stablehlo

# Largest difference to JAX's probabilities.
_TOLERANCE = 1e-4
# A file of this format holds at most 2 GiB; larger weights lie beside it.
_MAX_BYTES = 2**31 - 2**24


def save(
  folder: pathlib.Path,
  predict: stablehlo.Predict,
  weights: dict[str, np.ndarray],
  size: int,
) -> None:
  """Write `model.onnx`, which takes any number of images, and check it.

  It maps `images [N, size, size, 3]`, float pixels in 0..255, to `probabilities
  [N, classes]`. Weights of more than 2 GiB are in `model.onnx.data`.

  Args:
    folder: a folder that does not exist.
    predict: see `stablehlo.predictor`.
    weights: its first argument.
    size: side of its images, in pixels.

  Raises:
    ValueError: if onnxruntime computes other probabilities than JAX.
  """
  model = onnx_graph.convert(predict, weights, (size, size, 3))
  folder.mkdir()
  path = folder / 'model.onnx'
  is_large = sum(array.nbytes for array in weights.values()) > _MAX_BYTES
  onnx.save(
    model,
    path,
    save_as_external_data=is_large,
    location='model.onnx.data' if is_large else None,
  )
  onnx.checker.check_model(str(path))
  wrong = difference(path, predict, weights, size)
  if not wrong <= _TOLERANCE:  # True for NaN, too.
    raise ValueError(
      f'onnxruntime {onnxruntime.__version__} computes other probabilities '
      f'than JAX, by up to {wrong:.1e}. Leave --onnx out.'
    )


def difference(
  path: pathlib.Path,
  predict: stablehlo.Predict,
  weights: dict[str, np.ndarray],
  size: int,
) -> float:
  """Return the largest difference of probabilities on two random images."""
  shape = (2, size, size, 3)
  images = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
  session = onnxruntime.InferenceSession(
    str(path), providers=['CPUExecutionProvider']
  )
  (actual,) = session.run(None, {'images': images})
  with jax.default_matmul_precision('highest'):
    expected = jax.jit(predict)(weights, images)
  return float(np.max(np.abs(actual - np.asarray(expected))))
