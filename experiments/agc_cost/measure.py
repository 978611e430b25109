"""Compare time and memory of one update of `nfnet_jax.agc` and optax, NFNet-F0.

Prints the results and writes them to results.csv next to this file:

  python experiments/agc_cost/measure.py
"""

import argparse
import csv
import gc
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nfnet_jax

HERE = pathlib.Path(__file__).parent
MAKERS = {
  'nfnet_jax.agc': lambda: nfnet_jax.agc(0.01),
  'optax.adaptive_grad_clip': lambda: optax.adaptive_grad_clip(0.01),
}
COLUMNS = (
  'implementation',
  'jit_ms_median',
  'jit_ms_min',
  'jit_ms_iqr',
  'eager_peak_mib',
)


def make_trees():
  """Return random parameters and gradients of NFNet-F0, in float32."""
  model = nfnet_jax.create('nfnet_f0')
  size = model.spec.test_size
  params, _ = jax.eval_shape(
    lambda key: model.init(key, jnp.zeros((1, size, size, 3)), False),
    jax.random.key(0),
  )
  rng = np.random.default_rng(0)

  def draw(leaf):
    return jnp.asarray(rng.standard_normal(leaf.shape, np.float32))

  # Four orders of magnitude, so that some units are clipped and some are not.
  def draw_gradient(leaf):
    return draw(leaf) * np.float32(10 ** rng.uniform(-4, 0))

  return jax.tree.map(draw, params), jax.tree.map(draw_gradient, params)


def time_jit(repetitions: int) -> dict[str, list[float]]:
  """Time jitted updates in milliseconds; the implementations take turns."""
  params, grads = make_trees()
  calls = {}
  for name, make in MAKERS.items():
    tx = make()
    calls[name] = (jax.jit(tx.update), tx.init(params))
  times = {name: [] for name in MAKERS}
  for repetition in range(-2, repetitions):  # The first two warm up.
    names = list(MAKERS) if repetition % 2 else list(MAKERS)[::-1]
    for name in names:
      update, state = calls[name]
      start = time.perf_counter()
      jax.block_until_ready(update(grads, state, params))
      if repetition >= 0:
        times[name].append(1e3 * (time.perf_counter() - start))
  return times


def eager_peak(name: str) -> float:
  """Return by how much one eager update raises this process's RSS, in MiB."""
  params, grads = make_trees()
  tx = MAKERS[name]()
  state = tx.init(params)
  jax.block_until_ready(tx.update(grads, state, params))  # Compiles.
  gc.collect()
  before = _status_mib('VmRSS')
  # Resets VmHWM, the peak, to the current RSS: see proc(5).
  pathlib.Path('/proc/self/clear_refs').write_text('5')
  jax.block_until_ready(tx.update(grads, state, params))
  return _status_mib('VmHWM') - before


def _status_mib(field: str) -> float:
  status = pathlib.Path('/proc/self/status').read_text()
  return int(re.search(rf'{field}:\s+(\d+) kB', status)[1]) / 1024


def eager_peak_in_new_processes(name: str, processes: int) -> float:
  """Return the median of `eager_peak` over new processes."""
  # With default thresholds glibc keeps freed buffers, and the peak misses them.
  settings = {'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '0'}
  peaks = []
  for _ in range(processes):
    run = subprocess.run(
      [sys.executable, __file__, '--eager_peak', name],
      env={**os.environ, **settings},
      check=True,
      capture_output=True,
      text=True,
    )
    peaks.append(float(run.stdout.split()[-1]))
  print(f'{name}: eager peaks {peaks} MiB', flush=True)
  return statistics.median(peaks)


def summarise(times: list[float]) -> list[float]:
  """Return the median, the minimum and the interquartile range."""
  low, median, high = statistics.quantiles(times, n=4)
  return [median, min(times), high - low]


def make_rows(times: dict, peaks: dict) -> list[list[str]]:
  """Return one row per implementation, and one with the ratio ours / optax's.

  The ratio of times is computed within each repetition, so that changes of the
  machine's speed cancel. `jit_ms_min` is the ratio of the two minima.
  """
  rows = [[name, *summarise(times[name]), peaks[name]] for name in MAKERS]
  ours, theirs = MAKERS
  pairs = [mine / other for mine, other in zip(times[ours], times[theirs])]
  median, _, spread = summarise(pairs)
  minimum = min(times[ours]) / min(times[theirs])
  ratio = ['ratio', median, minimum, spread, peaks[ours] / peaks[theirs]]
  return [[row[0], *(f'{x:.1f}' for x in row[1:])] for row in rows] + [
    [ratio[0], *(f'{x:.3f}' for x in ratio[1:])]
  ]


def write_table(rows: list[list[str]], path: pathlib.Path):
  """Write and print the rows."""
  with path.open('w', newline='') as file:
    csv.writer(file, lineterminator='\n').writerows([COLUMNS, *rows])
  for row in [COLUMNS, *rows]:
    print(f'{row[0]:<26}' + ''.join(f'{cell:>16}' for cell in row[1:]))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--repetitions', type=int, default=40)
  parser.add_argument('--processes', type=int, default=3)
  parser.add_argument('--out', type=pathlib.Path, default=HERE / 'results.csv')
  parser.add_argument('--eager_peak', choices=MAKERS, help='internal')
  args = parser.parse_args()
  if args.eager_peak:
    print(eager_peak(args.eager_peak))
    return
  peaks = {
    name: eager_peak_in_new_processes(name, args.processes) for name in MAKERS
  }
  times = time_jit(args.repetitions)
  write_table(make_rows(times, peaks), args.out)


if __name__ == '__main__':
  main()
