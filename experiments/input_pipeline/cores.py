"""Compare the input pipeline's rate on one core with that on several.

  python experiments/input_pipeline/cores.py

The photos, the recipe and the batch are those of measure.py. A process that is
bound to its cores measures each row; the numbers of cores take turns in every
round. Writes cores.csv. It runs on Linux only.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

import measure

from nfnet_jax.data import sources

STAGES = measure.BASE, 'all', 'all, partners in batch'


def measure_here(data_dir: str, seconds: float) -> dict[str, float]:
  """Return the images per second of each stage in this process."""
  source = sources.load('photos', data_dir)
  rates = {}
  for stage in STAGES:
    batches = measure.stream(source, stage)
    for _ in range(4):  # Builds the graph and fills the buffers.
      next(batches)
    rates[stage] = 1 / measure.time_stage(batches, seconds)[0]
  return rates


def measure_bound(
  cores: list[int], data_dir: str, seconds: float
) -> dict[str, float]:
  """Return the rates of a process that may use these cores only."""
  command = [sys.executable, __file__, f'--seconds={seconds}']
  run = subprocess.run(
    [*command, f'--data_dir={data_dir}'],
    stdout=subprocess.PIPE,
    text=True,
    check=True,
    preexec_fn=lambda: os.sched_setaffinity(0, cores),
  )
  return json.loads(run.stdout)


def make_rows(rates: dict[int, list[dict[str, float]]]) -> list[dict]:
  """Return a row per stage and number of cores, with ratios to one core."""
  rows = []
  for stage in STAGES:
    for count, measured in rates.items():
      gains = [
        many[stage] / one[stage] for many, one in zip(measured, rates[1])
      ]
      rate = statistics.median(each[stage] for each in measured)
      rows.append(
        {
          'stage': stage,
          'cores': count,
          'images_per_s': round(rate, 1),
          'rate_to_one_core': round(statistics.median(gains), 2),
          'least': round(min(gains), 2),
          'most': round(max(gains), 2),
        }
      )
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--seconds', type=float, default=3.0)
  parser.add_argument('--data_dir', help='measure in this process, on its data')
  arguments = parser.parse_args()
  if arguments.data_dir:
    print(json.dumps(measure_here(arguments.data_dir, arguments.seconds)))
    return
  available = sorted(os.sched_getaffinity(0))
  rates: dict[int, list] = {count + 1: [] for count in range(len(available))}
  with tempfile.TemporaryDirectory() as data_dir:
    measure.build(data_dir)
    for _ in range(arguments.rounds):
      for count, measured in rates.items():
        cores = available[:count]
        measured.append(measure_bound(cores, data_dir, arguments.seconds))
        print(count, measured[-1], flush=True)
  rows = make_rows(rates)
  measure.write_rows('cores.csv', rows)
  for row in rows:
    print(*row.values())


if __name__ == '__main__':
  main()
