"""Train a plain JAX network under SGD, AdamW and Lion, with and without AGC.

python -m experiments.agc_elsewhere.run
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from sklearn import datasets as sklearn_datasets
import tqdm

from experiments.studies import figures, study, summaries, tables
from nfnet_jax import agc

DEPTH, WIDTH, CLASSES = 10, 64, 10
BATCH, EPOCHS = 64, 30
SEEDS = 5
RATES = tuple(10 ** (power / 2) for power in range(-8, 3))  # 1e-4 to 10.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  'SGD': functools.partial(optax.sgd, momentum=0.9, nesterov=True),
  'AdamW': functools.partial(optax.adamw, weight_decay=1e-4),
  'Lion': functools.partial(optax.lion, weight_decay=1e-4),
}
CLIPPINGS: dict[str, Callable[[], optax.GradientTransformation]] = {
  'none': optax.identity,
  'AGC': lambda: agc(0.01, exclude=_is_classifier),
  'AGC 0.1': lambda: agc(0.1, exclude=_is_classifier),
  'global norm': lambda: optax.clip_by_global_norm(1.0),
}
TRAINED = 0.9  # Held-out accuracy that counts as trained.


def _is_classifier(path: str) -> bool:
  return path.startswith('classifier')


def initialize(key: jax.Array) -> dict[str, dict[str, jax.Array]]:
  """Return parameters of a deep multilayer perceptron, with He's scale."""
  sizes = [64, *[WIDTH] * DEPTH, CLASSES]
  names = [*(f'layer_{i}' for i in range(DEPTH)), 'classifier']
  return {
    name: {
      'w': jax.random.normal(key, (rows, columns)) * jnp.sqrt(2 / rows),
      'b': jnp.zeros(columns),
    }
    for name, key, rows, columns in zip(
      names, jax.random.split(key, len(names)), sizes, sizes[1:]
    )
  }


def apply(params: dict[str, dict[str, jax.Array]], x: jax.Array) -> jax.Array:
  """Return the logits; no layer is normalised, and none is skipped."""
  for index in range(DEPTH):
    layer = params[f'layer_{index}']
    x = jax.nn.relu(x @ layer['w'] + layer['b'])
  return x @ params['classifier']['w'] + params['classifier']['b']


def load() -> tuple[tuple[np.ndarray, np.ndarray], ...]:
  """Return images `[N, 64]` and labels to train on, and those held out."""
  digits = sklearn_datasets.load_digits()
  images = (digits.data / 8 - 1).astype(np.float32)
  held_out = np.arange(len(images)) % 5 == 4
  return tuple(
    (images[chosen], digits.target[chosen]) for chosen in (~held_out, held_out)
  )


def train(
  optimizer: str, clipping: str, epochs: int, rate: jax.Array, seed: jax.Array
) -> dict[str, jax.Array]:
  """Train a network; return its held-out accuracy and last training loss."""
  (images, labels), (test_images, test_labels) = load()
  tx = optax.chain(CLIPPINGS[clipping](), OPTIMIZERS[optimizer](rate))
  init_key, order_key = jax.random.split(jax.random.key(seed))
  params = initialize(init_key)
  per_epoch = len(images) // BATCH

  def loss_fn(params, chosen):
    logits = apply(params, jnp.asarray(images)[chosen])
    targets = jnp.asarray(labels)[chosen]
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, targets
    ).mean()

  def step(carry, chosen):
    params, state = carry
    loss, grads = jax.value_and_grad(loss_fn)(params, chosen)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), loss

  def epoch(carry, key):
    order = jax.random.permutation(key, len(images))[: per_epoch * BATCH]
    return jax.lax.scan(step, carry, order.reshape(per_epoch, BATCH))

  (params, _), losses = jax.lax.scan(
    epoch, (params, tx.init(params)), jax.random.split(order_key, epochs)
  )
  hits = jnp.argmax(apply(params, test_images), axis=-1) == test_labels
  loss = losses[-1].mean()
  return {
    'top1': jnp.where(jnp.isfinite(loss), hits.mean(), 0.0),
    'train_loss': loss,
  }


def answer(options: study.Options) -> str:
  """Train what has not been trained, draw, and return the verdict."""
  path = options.folder / 'results.csv'
  rows = tables.read(path)
  pairs = [(name, clip) for name in OPTIMIZERS for clip in CLIPPINGS]
  done = set() if rows.empty else set(zip(rows.optimizer, rows.method))
  for optimizer, clipping in tqdm.tqdm([p for p in pairs if p not in done]):
    new = train_all(optimizer, clipping, options.quick)
    rows = pd.concat([rows, new], ignore_index=True)
    tables.write(path, rows)
    tables.write_machine(options.folder, rows.core_seconds.sum() / 60)
  draw(rows, options.folder)
  return verdict(rows)


def train_all(optimizer: str, clipping: str, quick: bool) -> pd.DataFrame:
  """Train at all rates with all seeds; return their rows."""
  rates = jnp.array(RATES[::5] if quick else RATES)
  seeds = jnp.arange(1 if quick else SEEDS)
  run = functools.partial(train, optimizer, clipping, 1 if quick else EPOCHS)
  start = time.process_time()
  # One after another: products of stacked matrices are slow on CPUs.
  over_seeds = lambda rate: jax.lax.map(lambda seed: run(rate, seed), seeds)
  results = jax.device_get(
    jax.jit(lambda rates: jax.lax.map(over_seeds, rates))(rates)
  )
  seconds = (time.process_time() - start) / results['top1'].size
  return pd.DataFrame(
    [
      {
        'optimizer': optimizer,
        'method': clipping,
        'learning_rate': float(f'{rate:.3g}'),
        'seed': int(seed),
        'top1': round(float(results['top1'][i, j]), 4),
        'train_loss': round(float(results['train_loss'][i, j]), 4),
        'core_seconds': round(seconds, 2),
      }
      for i, rate in enumerate(rates)
      for j, seed in enumerate(seeds)
    ]
  )


def draw(rows: pd.DataFrame, folder: pathlib.Path) -> None:
  """Draw accuracy by learning rate, a panel per optimiser."""
  rows = rows.assign(percent=100 * rows.top1)
  figure, axes = figures.subplots(columns=len(OPTIMIZERS), sharey=True)
  for axis, optimizer in zip(axes.flat, OPTIMIZERS):
    for clipping in CLIPPINGS:
      mine = rows[(rows.optimizer == optimizer) & (rows.method == clipping)]
      figures.band(axis, mine, 'learning_rate', 'percent', clipping)
    axis.set(xscale='log', xlabel='learning rate')
    figures.chance(axis)
  axes[0, 0].set_ylabel('held-out top-1 (%)')
  figures.titles(axes.flat, list(OPTIMIZERS))
  figures.legend_below(figure, axes[0, 0])
  figures.save(figure, folder, 'results.png')


def verdict(rows: pd.DataFrame) -> str:
  """Return the learning rates at which all seeds train, in sentences."""
  text = []
  for optimizer in OPTIMIZERS:
    parts = []
    for clipping in CLIPPINGS:
      mine = rows[(rows.optimizer == optimizer) & (rows.method == clipping)]
      trained = summaries.trained_at(mine, 'learning_rate', TRAINED)
      best = mine.groupby('learning_rate').top1.mean().max()
      parts.append(f'{clipping}: {trained} (best mean {100 * best:.1f} %)')
    text.append(f'{optimizer}, {"; ".join(parts)}.')
  return f'All seeds reach {TRAINED:.0%} at these learning rates. ' + ' '.join(
    text
  )


if __name__ == '__main__':
  study.main(
    'Does AGC help a network that is no NFNet, by optimiser?',
    pathlib.Path(__file__).parent,
    answer,
  )
