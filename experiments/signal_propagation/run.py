"""Measure the signal of ResNets block by block, without parts of their design.

python -m experiments.signal_propagation.run
"""

from __future__ import annotations

import pathlib
import time

import jax
import numpy as np
import pandas as pd
from sklearn import datasets as sklearn_datasets

from experiments.studies import figures, study, tables
from nfnet_jax import trees
from nfnet_jax.experiments import signal_propagation
from nfnet_jax.models import inputs, layers, normalizer_free, registry

SEEDS = (0, 1, 2)
IMAGES, SIZE = 8, 224
NOISE, PHOTOS = 'noise', 'photographs'
COLUMNS = ('sq_mean', 'var', 'residual_var')
TITLES = (
  'average squared channel mean',
  'average channel variance',
  'variance of the residual branch',
)
FULL = 'NF'
# Network -> its model and what is left out of it.
NETWORKS = {
  'BN': ('bn_resnet', ''),
  FULL: ('nf_resnet', ''),
  'NF without weight standardisation': ('nf_resnet', 'standardisation'),
  'NF without gamma': ('nf_resnet', 'gamma'),
  'NF without alpha and beta': ('nf_resnet', 'alpha and beta'),
  'FixUp': ('fixup_resnet', ''),
  'SkipInit': ('skipinit_resnet', 'skip gain'),
}


class _Everything:
  """A container of everything."""

  def __contains__(self, item: object) -> bool:
    return True


def measure(
  network: str, depth: str, seed: int, images: jax.Array
) -> list[dict[str, float]]:
  """Return the statistics of every block of a network with initial weights."""
  family, omitted = NETWORKS[network]
  alpha = {'alpha': 1.0} if omitted == 'alpha and beta' else {}
  model = registry.create_model(family + depth, stochdepth_rate=0.0, **alpha)
  params, state = signal_propagation.initialize(model, seed)
  if omitted == 'gamma':
    params = _divide_gains(params, {}, layers.ACTIVATIONS['relu'][1])
  if omitted == 'alpha and beta':
    params = _divide_gains(params, _betas(model), 1.0)
  if omitted == 'skip gain':  # The method starts without residual branches.
    params = trees.map_named(
      lambda path, p: p * (not path.endswith('skip_gain')), params
    )
  raw = _Everything() if omitted == 'standardisation' else ()
  with layers.kernels_are_standardized(raw):
    return signal_propagation.measure(model, params, state, images)


def _betas(model: registry.Model) -> dict[str, float]:
  """Return the factor at each block's input by the block's name."""
  variant = model.spec.family.variants[model.spec.variant]
  betas = normalizer_free.betas(variant.depth, alpha=1.0)
  name = 'nf_res_block'
  return {f'{name}_{i}' if i else name: beta for i, beta in enumerate(betas)}


def _divide_gains(params, betas: dict[str, float], gamma: float):
  """Undo factors of activations in the gains of the convolutions behind them.

  The stem's convolution has no activation before it; a block's factor beta is
  that of its first convolution and of its shortcut.
  """

  def divide(path: str, value: jax.Array) -> jax.Array:
    *modules, name = path.split('/')
    if name != 'gain' or len(modules) < 4:
      return value
    block, conv = modules[-3], modules[-1]
    is_first = conv in ('conv0', 'conv_shortcut')
    return value / (gamma * (betas.get(block, 1.0) if is_first else 1.0))

  return trees.map_named(divide, params)


def load_images(kind: str) -> jax.Array:
  """Return normalised images `[IMAGES, SIZE, SIZE, 3]`.

  The photographs are crops of the two that scikit-learn has.
  """
  if kind == NOISE:
    return jax.random.normal(jax.random.key(0), (IMAGES, SIZE, SIZE, 3))
  crops = []
  for photo in sklearn_datasets.load_sample_images().images:
    height, width, _ = photo.shape
    for left in np.linspace(0, width - SIZE, IMAGES // 2, dtype=int):
      top = (height - SIZE) // 2
      crops.append(photo[top : top + SIZE, left : left + SIZE])
  return inputs.normalize_images(np.stack(crops).astype(np.float32))


def answer(options: study.Options) -> str:
  """Measure, draw, and return the verdict."""
  path = options.folder / 'results.csv'
  rows = tables.read(path)
  if rows.empty:
    start = time.process_time()
    rows = measure_all('50' if not options.quick else '_pico', options.quick)
    tables.write(path, rows)
    minutes = (time.process_time() - start) / 60
    tables.write_machine(options.folder, minutes)
  draw(rows, options.folder)
  return verdict(rows)


def measure_all(depth: str, quick: bool) -> pd.DataFrame:
  """Return the statistics of all networks, images and seeds."""
  rows = []
  for kind in (NOISE, PHOTOS):
    images = load_images(kind)
    for network in NETWORKS:
      for seed in SEEDS[:1] if quick else SEEDS:
        blocks = measure(network, depth, seed, images)
        labels = {'images': kind, 'network': network, 'seed': seed}
        rows += [{**labels, **block} for block in blocks]
      print(f'{kind}: {network}', flush=True)
  return pd.DataFrame(rows)


def draw(rows: pd.DataFrame, folder: pathlib.Path) -> None:
  """Draw the three statistics by block, for both kinds of images."""
  figure, axes = figures.subplots(columns=3, rows=2)
  for line, kind in zip(axes, (NOISE, PHOTOS)):
    for axis, column, title in zip(line, COLUMNS, TITLES):
      for network in NETWORKS:
        mine = rows[(rows.images == kind) & (rows.network == network)]
        figures.band(axis, mine, 'block', column, network)
      axis.set(yscale='log', xlabel='block')
      axis.set_title(title, fontsize=10)
    line[0].set_ylabel(kind)
  figures.legend_below(figure, axes[0, 0])
  figures.save(figure, folder, 'results.png')


def verdict(rows: pd.DataFrame) -> str:
  """Return what the statistics show, in sentences."""
  last = rows[rows.block == rows.block.max()]
  text = []
  for kind in (NOISE, PHOTOS):
    mean = last[last.images == kind].groupby('network')[list(COLUMNS)].mean()
    parts = [
      f'{name} {mean.sq_mean[name]:.3g} and {mean["var"][name]:.3g}'
      for name in NETWORKS
    ]
    text.append(
      f'Squared mean and variance after the last block, {kind}: '
      f'{"; ".join(parts)}.'
    )
  return ' '.join(text)


if __name__ == '__main__':
  study.main(
    'How do mean and variance of the signal grow with depth at the start?',
    pathlib.Path(__file__).parent,
    answer,
  )
