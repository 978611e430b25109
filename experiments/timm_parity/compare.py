"""Compare timm's logits with ours, from weights in timm's layout.

  pip install timm
  python experiments/timm_parity/compare.py

Writes random weights of each network in timm's layout, loads the file with timm
and compares the logits. Those of the published networks are compared with both
the published forward pass and `timm_forward`; those of light networks with the
only one that they have. Writes `results.csv` next to this file.
"""

import argparse
import csv
import dataclasses
import pathlib
import tempfile

import jax
import numpy as np
import timm
import torch

import nfnet_jax
from nfnet_jax.weights import network, save

HERE = pathlib.Path(__file__).parent
# Light networks have the same names in timm.
LIGHT = 'nfnet_l0', *(f'eca_nfnet_l{index}' for index in range(4))
NETWORKS = *(f'nfnet_f{index}' for index in range(7)), *LIGHT


def random_weights(name: str) -> network.Weights:
  """Return random weights that give every part of the network an effect."""
  model = nfnet_jax.create(name)
  images = np.zeros((1, 32, 32, 3), np.float32)
  params, _ = jax.jit(lambda key: model.init(key, images, False))(
    jax.random.key(0)
  )
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    kind = path[-1].key
    if kind == 'w':
      return np.asarray(leaf)
    noise = 0.1 * rng.standard_normal(leaf.shape)
    is_zero_gain = kind.endswith('gain') and not np.any(leaf)
    return np.asarray(leaf + noise + 0.5 * is_zero_gain, np.float32)

  params = jax.tree.map_with_path(draw, params)
  spec = model.spec
  return network.Weights(
    params=params,
    model_state={},
    model=name,
    num_classes=1000,
    options={},
    class_names=(),
    preprocessing=spec.preprocessing,
  )


def our_logits(weights: network.Weights, images: np.ndarray) -> np.ndarray:
  apply = weights.create().apply
  run = jax.jit(lambda params, x: apply(params, {}, None, x, False)[0])
  return np.asarray(run(weights.params, images))


def timm_logits(name: str, path: str, images: np.ndarray) -> np.ndarray:
  theirs = name if name in LIGHT else f'dm_{name}'
  model = timm.create_model(theirs, checkpoint_path=path).eval()
  with torch.no_grad():
    return model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


def compare(name: str, size: int) -> dict[str, str | int]:
  """Compare the logits of two images of noise."""
  weights = random_weights(name)
  shape = (2, size, size, 3)
  images = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
  with tempfile.TemporaryDirectory() as folder:
    path = f'{folder}/{name}.safetensors'
    save.save_weights(path, weights, layout='timm')
    theirs = timm_logits(name, path, images)
  as_timm, published = weights, ''
  if name not in LIGHT:
    as_timm = dataclasses.replace(weights, options={'timm_forward': True})
    published = f'{difference(weights, images, theirs):.2e}'
  return {
    'network': name,
    'pixels': size,
    'largest_logit': f'{np.abs(theirs).max():.3f}',
    'difference_timm_forward': f'{difference(as_timm, images, theirs):.2e}',
    'difference_published_forward': published,
  }


def difference(
  weights: network.Weights, images: np.ndarray, theirs: np.ndarray
) -> float:
  """Return the largest difference between our logits and timm's."""
  return float(np.abs(our_logits(weights, images) - theirs).max())


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--networks', nargs='+', default=NETWORKS)
  # SAME padding differs between even and odd sizes.
  parser.add_argument('--sizes', nargs='+', type=int, default=[192, 225])
  parser.add_argument('--out', type=pathlib.Path, default=HERE / 'results.csv')
  options = parser.parse_args()
  print(f'timm {timm.__version__}, torch {torch.__version__}')
  rows = []
  for name in options.networks:
    for size in options.sizes:
      rows.append(compare(name, size))
      print(rows[-1], flush=True)
  with options.out.open('w', newline='') as file:
    writer = csv.DictWriter(file, rows[0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
  worst = max(float(row['difference_timm_forward']) for row in rows)
  if worst > 1e-4:
    raise SystemExit(f'Logits differ by {worst:.1e}, more than 1e-4.')


if __name__ == '__main__':
  main()
