"""Compare the inference time of a network in several forms.

Prints the results and writes them to results.csv next to this file:

  pip install '.[onnx]'
  python experiments/folding/measure.py

With torch and timm installed, timm's network of the same name takes turns with
ours.
"""

import argparse
from collections.abc import Callable
import csv
import gc
import importlib.util
import pathlib
import statistics
import time
from typing import Any

import jax
import numpy as np
import onnxruntime

import nfnet_jax
from nfnet_jax.export import fold, onnx_graph, stablehlo
from nfnet_jax.weights import inference, network

HERE = pathlib.Path(__file__).parent
# Our name -> timm's.
MODELS = {
  'nfnet_f0': 'dm_nfnet_f0',
  'eca_nfnet_l0': 'eca_nfnet_l0',
  'efficientnet_b0': 'efficientnet_b0',
}
BATCHES = (1, 4, 8)
# What ratios are relative to.
BASE = 'unfolded'
COLUMNS = 'model', 'pixels', 'batch', 'form', 'ms', 'ratio', 'iqr'


def make_variables(model):
  """Return random parameters and running statistics of a model."""
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

  return jax.tree_util.tree_map_with_path(draw, shapes)


def make_forms(name: str) -> dict[str, Callable[[np.ndarray], Any]]:
  """Return all forms of a network as functions that hold their weights."""
  model = nfnet_jax.create_model(name)
  variables = make_variables(model)
  folded = fold.fold(model, *variables)
  forms = {
    BASE: _unfolded(model, variables),
    'predict': _predict(model, variables),
    'folded': _folded(folded),
    'onnxruntime': _onnx(folded, model.spec.test_size),
  }
  if 'fast_convs' in model.spec.fast_paths:
    fast = nfnet_jax.create_model(name, fast_convs=True)
    forms['unfolded, fast convolutions'] = _unfolded(fast, variables)
    forms['folded, fast convolutions'] = _folded(fold.fold(fast, *variables))
  if importlib.util.find_spec('timm'):
    forms['timm'] = _timm(MODELS[name], channels_last=False)
    forms['timm, channels last'] = _timm(MODELS[name], channels_last=True)
  return forms


def _unfolded(model, variables):
  apply = jax.jit(lambda v, images: model.apply(*v, None, images, False)[0])
  variables = jax.device_put(variables)
  return lambda images: jax.block_until_ready(apply(variables, images))


def _predict(model, variables):
  """Return what the command `predict` does, once images are decoded."""
  weights = network.Weights(
    *variables,
    model=model.spec.name,
    num_classes=1000,
    options={},
    class_names=[],
    preprocessing=model.spec.preprocessing,
  )
  predictor = inference.Predictor(weights)
  return lambda images: predictor(images, len(images))


def _folded(folded: fold.Folded):
  apply, params = jax.jit(folded.apply), jax.device_put(folded.params)
  return lambda images: jax.block_until_ready(apply(params, images))


def _onnx(folded: fold.Folded, size: int):
  graph = onnx_graph.convert(
    lambda weights, images: folded.apply(stablehlo.unflatten(weights), images),
    stablehlo.flatten(folded.params),
    (size, size, 3),
  )
  session = onnxruntime.InferenceSession(graph.SerializeToString())
  return lambda images: session.run(None, {'images': images})


def _timm(name: str, channels_last: bool):
  import timm
  import torch

  layout = torch.channels_last if channels_last else torch.contiguous_format
  model = timm.create_model(name).eval().to(memory_format=layout)

  @torch.inference_mode()
  def run(images):
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    return model(images.contiguous(memory_format=layout))

  return run


def measure(forms: dict, images: np.ndarray, repetitions: int) -> dict:
  """Time the forms in milliseconds; they take turns, in random order."""
  times = {name: [] for name in forms}
  rng = np.random.default_rng(2)
  for repetition in range(-2, repetitions):  # The first two warm up.
    for name in rng.permutation(list(forms)):
      start = time.perf_counter()
      forms[name](images)
      if repetition >= 0:
        times[name].append(1e3 * (time.perf_counter() - start))
  return times


def make_rows(name: str, images: np.ndarray, times: dict) -> list[tuple]:
  """Return a row of results for each form.

  Ratios are computed within repetitions, so that changes of the machine's speed
  cancel.
  """
  batch, pixels = images.shape[:2]
  rows = []
  for form, values in times.items():
    ratios = [a / b for a, b in zip(values, times[BASE])]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    spread, ms = f'{high - low:.3f}', f'{statistics.median(values):.1f}'
    rows.append((name, pixels, batch, form, ms, f'{ratio:.3f}', spread))
  return rows


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--repetitions', type=int, default=15)
  parser.add_argument('--models', nargs='+', default=list(MODELS))
  parser.add_argument('--batches', type=int, nargs='+', default=BATCHES)
  parser.add_argument('--out', type=pathlib.Path, default=HERE / 'results.csv')
  args = parser.parse_args()
  rows = [COLUMNS]
  for name in args.models:
    forms = make_forms(name)
    size = nfnet_jax.create_model(name).spec.test_size
    for batch in args.batches:
      shape = batch, size, size, 3
      images = np.random.default_rng(1).normal(size=shape).astype(np.float32)
      times = measure(forms, images, args.repetitions)
      rows += make_rows(name, images, times)
      for row in rows[-len(forms) :]:
        print(*row, flush=True)
    del forms
    gc.collect()
  with args.out.open('w', newline='') as file:
    csv.writer(file, lineterminator='\n').writerows(rows)


if __name__ == '__main__':
  main()
