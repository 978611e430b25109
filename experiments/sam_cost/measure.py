"""Measure time and FLOPs of a step without SAM, with SAM on 20 % and on all.

Prints the results and writes them to results.csv next to this file:

  python experiments/sam_cost/measure.py
"""

import argparse
import csv
import itertools
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import nfnet_jax
from nfnet_jax.training import layouts
from nfnet_jax.training import state as state_lib
from nfnet_jax.training import step as step_lib

HERE = pathlib.Path(__file__).parent
STEPS = {
  'plain': {},
  'SAM on 20 %': {'sam_rho': 0.05, 'sam_share': 0.2},
  'SAM on all': {'sam_rho': 0.05, 'sam_share': 1.0},
}
# Network -> image size in pixels, examples per device, rounds of timing.
NETWORKS = {
  'nfnet_nano': (32, 64, 40),
  'nfnet_f5': (416, 32, 0),  # As the paper trains it on 128 cores.
}
COLUMNS = (
  'network',
  'pixels',
  'examples',
  'step',
  'wall_ms_median',
  'wall_ratio_median',
  'wall_ratio_iqr',
  'cpu_ratio_median',
  'cpu_ratio_iqr',
  'flops_ratio',
)


def make_step(network: str, examples: int, options: dict):
  """Return a trainer and its jitted one-device step; it donates the state."""
  trainer = step_lib.Trainer(
    model=nfnet_jax.create(network, stochdepth_rate=0.25),
    optimizer=nfnet_jax.make_optimizer(0.01),
    schedule=lambda _: 0.01,
    num_classes=1000,
    global_batch=examples,
    layout=layouts.Layout(axis=None),
    **options,
  )
  return trainer, jax.jit(trainer.train_step, donate_argnums=0)


def make_batch(size: int, examples: int) -> dict[str, np.ndarray]:
  """Return random images with two labels each, as after MixUp or CutMix."""
  rng = np.random.default_rng(0)
  return {
    'image': rng.integers(0, 256, (examples, size, size, 3), np.uint8),
    'label': rng.integers(0, 1000, (examples, 2), np.int32),
    'weight': np.full((examples, 2), 0.5, np.float32),
    'position': np.arange(examples, dtype=np.int32),
    'step': np.int32(0),
  }


def count_flops(network: str, size: int, examples: int) -> dict[str, float]:
  """Count each step's FLOPs in the program before XLA optimises it."""
  flops = {}
  for name, options in STEPS.items():
    trainer, step = make_step(network, examples, options)
    state = state_lib.abstract_state(trainer.model, trainer.optimizer, size)
    shape = lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype)
    batch = jax.tree.map(shape, make_batch(1, examples))
    images = (examples, size, size, 3)
    batch['image'] = jax.ShapeDtypeStruct(images, jnp.uint8)
    flops[name] = step.lower(state, batch).cost_analysis()['flops']
  return flops


def time_steps(network: str, size: int, examples: int, rounds: int):
  """Time the steps, which take turns in all orders and pass on one state.

  Returns:
    Seconds of wall time and processor time: `{name: [(wall, cpu), ...]}`.
  """
  batch = jax.device_put(make_batch(size, examples))
  steps = {}
  for name, options in STEPS.items():
    trainer, steps[name] = make_step(network, examples, options)
  state = state_lib.create_state(
    trainer.model, trainer.optimizer, seed=0, image_size=size
  )
  times = {name: [] for name in STEPS}
  orders = itertools.cycle(itertools.permutations(STEPS))
  for repetition, order in zip(range(-2, rounds), orders):  # Two warm up.
    for name in order:
      batch['step'] = state.step + 0  # A copy, because the state is donated.
      jax.block_until_ready(batch)
      start = time.perf_counter(), time.process_time()
      state, metrics = jax.block_until_ready(steps[name](state, batch))
      end = time.perf_counter(), time.process_time()
      if not metrics['applied']:
        raise ArithmeticError(f'{network}, {name}: the step was not applied.')
      if repetition >= 0:
        times[name].append((end[0] - start[0], end[1] - start[1]))
  return times


def spread(values: list[float]) -> tuple[float, float]:
  """Return the median and the interquartile range."""
  low, median, high = statistics.quantiles(values, n=4)
  return median, high - low


def make_rows(network: str, size: int, examples: int, rounds: int):
  """Yield one row per step; ratios are to the plain step of the same round."""
  flops = count_flops(network, size, examples)
  times = time_steps(network, size, examples, rounds) if rounds else {}
  for name in STEPS:
    row = dict.fromkeys(COLUMNS, '')
    row |= {'network': network, 'pixels': size, 'examples': examples}
    row |= {'step': name}
    row['flops_ratio'] = f'{flops[name] / flops["plain"]:.3f}'
    if times:
      row['wall_ms_median'] = (
        f'{1e3 * spread([w for w, _ in times[name]])[0]:.1f}'
      )
      for index, clock in enumerate(('wall', 'cpu')):
        pairs = zip(times[name], times['plain'])
        median, iqr = spread(
          [ours[index] / base[index] for ours, base in pairs]
        )
        row[f'{clock}_ratio_median'] = f'{median:.3f}'
        row[f'{clock}_ratio_iqr'] = f'{iqr:.3f}'
    yield row


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--out', type=pathlib.Path, default=HERE / 'results.csv')
  args = parser.parse_args()
  rows = []
  for network, (size, examples, rounds) in NETWORKS.items():
    for row in make_rows(network, size, examples, rounds):
      print(' '.join(map(str, row.values())), flush=True)
      rows.append(row)
  with args.out.open('w', newline='') as file:
    writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)


if __name__ == '__main__':
  main()
