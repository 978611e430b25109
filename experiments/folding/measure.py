"""Compare the inference time of unfolded, folded and ONNX networks.

Prints the results and writes them to results.csv next to this file:

  pip install 'nfnet_jax[onnx]'
  python experiments/folding/measure.py
"""

import argparse
from collections.abc import Callable
import csv
import gc
import pathlib
import statistics
import time

import jax
import numpy as np
import onnxruntime

import nfnet_jax
from nfnet_jax.export import fold, onnx_graph, stablehlo

HERE = pathlib.Path(__file__).parent
MODELS = ('nfnet_f0', 'eca_nfnet_l0', 'efficientnet_b0')
BATCHES = (1, 8)
COLUMNS = (
  'model',
  'pixels',
  'batch',
  'unfolded_ms',
  'folded_ms',
  'onnx_ms',
  'folded_to_unfolded',
  'folded_to_unfolded_iqr',
  'onnx_to_folded',
  'onnx_to_folded_iqr',
)


def make_network(name: str):
  """Return a model with random parameters and running statistics."""
  model = nfnet_jax.create(name)
  size = model.spec.test_size
  image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
  init = lambda key, image: model.init(key, image, False)
  shapes = jax.eval_shape(init, jax.random.key(0), image)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    x = rng.standard_normal(leaf.shape, np.float32)
    name = path[-1].key
    if name == 'w':
      return x / np.sqrt(np.float32(x.size / x.shape[-1]))
    positive = name in ('gain', 'skip_gain', 'scale', 'average')
    return np.exp(0.1 * x) if positive else np.asarray(0.1 * x)

  return model, *jax.tree_util.tree_map_with_path(draw, shapes)


def make_calls(name: str, batch: int) -> dict[str, Callable[[], jax.Array]]:
  """Return all versions as functions that hold their weights."""
  model, *variables = make_network(name)
  folded = fold.fold(model, *variables)
  size = model.spec.test_size
  pixels = np.random.default_rng(1).normal(size=(batch, size, size, 3))
  pixels = pixels.astype(np.float32)
  model_bytes = onnx_graph.convert(
    lambda weights, images: folded.apply(stablehlo.unflatten(weights), images),
    stablehlo.flatten(folded.params),
    (size, size, 3),
  ).SerializeToString()
  session = onnxruntime.InferenceSession(model_bytes)
  images = jax.device_put(pixels)
  variables, params = jax.device_put((variables, folded.params))
  unfolded = jax.jit(lambda v, images: model.apply(*v, None, images, False)[0])
  apply = jax.jit(folded.apply)
  return {
    'unfolded': lambda: unfolded(variables, images),
    'folded': lambda: apply(params, images),
    'onnx': lambda: session.run(None, {'images': pixels}),
  }


def measure(calls: dict, repetitions: int) -> dict[str, list[float]]:
  """Time the calls in milliseconds; they take turns, in alternating order."""
  times = {name: [] for name in calls}
  for repetition in range(-2, repetitions):  # The first two warm up.
    for name in list(calls)[:: 1 if repetition % 2 else -1]:
      start = time.perf_counter()
      jax.block_until_ready(calls[name]())
      if repetition >= 0:
        times[name].append(1e3 * (time.perf_counter() - start))
  return times


def make_row(name: str, batch: int, times: dict[str, list[float]]) -> list:
  """Return a row of results.

  Ratios are computed within repetitions, so that changes of the machine's speed
  cancel.
  """
  compared = []
  for one, other in (('folded', 'unfolded'), ('onnx', 'folded')):
    ratios = [a / b for a, b in zip(times[one], times[other])]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    compared += [f'{ratio:.3f}', f'{high - low:.3f}']
  medians = [statistics.median(values) for values in times.values()]
  return [
    name,
    nfnet_jax.create(name).spec.test_size,
    batch,
    *(f'{value:.1f}' for value in medians),
    *compared,
  ]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--repetitions', type=int, default=40)
  parser.add_argument('--out', type=pathlib.Path, default=HERE / 'results.csv')
  args = parser.parse_args()
  rows = [COLUMNS]
  for name in MODELS:
    for batch in BATCHES:
      times = measure(make_calls(name, batch), args.repetitions)
      rows.append(make_row(name, batch, times))
      print(rows[-1], flush=True)
      gc.collect()
  with args.out.open('w', newline='') as file:
    csv.writer(file, lineterminator='\n').writerows(rows)


if __name__ == '__main__':
  main()
