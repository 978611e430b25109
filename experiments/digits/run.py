"""Measure accuracy, time and memory of the README's first command, three seeds.

  python experiments/digits/run.py

Writes `results.csv`, `curves.png` and `run.png` (the curves of the first seed)
next to this file.
"""

import argparse
import csv
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from matplotlib import pyplot

from nfnet_jax.training import metrics

HERE = pathlib.Path(__file__).parent
SEEDS = (0, 1, 2)


def measure(seed: int, folder: pathlib.Path) -> dict[str, float]:
  """Prepare the data and train, in a separate process."""
  workdir = folder / f'seed{seed}'
  command = [sys.executable, '-m', 'nfnet_jax.experiments.train']
  command += ['--config=digits', f'--config.seed={seed}']
  command += [f'--config.run.data_dir={workdir}/data', f'--workdir={workdir}']
  start = time.perf_counter()
  process = subprocess.Popen(command)
  _, status, usage = os.wait4(process.pid, 0)
  if status:
    raise RuntimeError(f'Training with seed {seed} failed.')
  rows = metrics.read_metrics(workdir / 'metrics.jsonl')
  final = [row for row in rows if 'eval/top1' in row][-1]
  return {
    'seed': seed,
    'steps': final['step'],
    'top1': round(final['eval/top1'], 4),
    'ema_top1': round(final['eval_ema/top1'], 4),
    'seconds': round(time.perf_counter() - start, 1),
    'peak_mib': round(usage.ru_maxrss / 1024),
  }


def plot(folder: pathlib.Path) -> None:
  """Plot the held-out accuracy of every seed."""
  figure, axis = pyplot.subplots(figsize=(7, 4))
  for seed in SEEDS:
    rows = metrics.read_metrics(folder / f'seed{seed}' / 'metrics.jsonl')
    points = [
      (row['step'], 100 * row['eval_ema/top1'])
      for row in rows
      if 'eval_ema/top1' in row
    ]
    axis.plot(*zip(*points), marker='o', label=f'seed {seed}')
  axis.axhline(98, color='grey', linestyle=':')
  axis.set(xlabel='step', ylabel='held-out top-1, EMA weights (%)')
  axis.legend()
  axis.grid(alpha=0.3)
  figure.tight_layout()
  figure.savefig(HERE / 'curves.png', dpi=110)


def main() -> None:
  argparse.ArgumentParser(description=__doc__).parse_args()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    rows = [measure(seed, folder) for seed in SEEDS]
    plot(folder)
    shutil.copy(folder / 'seed0' / 'curves.png', HERE / 'run.png')
  with (HERE / 'results.csv').open('w', newline='') as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
  for row in rows:
    print(row)


if __name__ == '__main__':
  main()
