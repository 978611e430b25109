"""Compare the estimated step times of NFNets with measured ones on TPU v3.

Writes results.csv and results.png next to this file, and prints the table:

  python experiments/plan_calibration/measure.py nfnet_f0 nfnet_f1
"""

import argparse
import csv
import json
import pathlib
import statistics
import subprocess
import sys

import matplotlib

matplotlib.use('agg')
from matplotlib import pyplot as plt

HERE = pathlib.Path(__file__).parent
# Milliseconds per step of 32 images per core, arXiv 2102.06171, tables 3 and 6.
MEASURED = {
  'nfnet_f0': 73.3,
  'nfnet_f1': 158.5,
  'nfnet_f2': 295.8,
  'nfnet_f3': 532.2,
  'nfnet_f4': 1033.3,
  'nfnet_f5': 1398.5,
  'nfnet_f0_baseline': 58.0,
  'nfnet_f0_modified_width': 64.1,
  'nfnet_f0_default_width': 65.9,
}
IMAGES = 32
COLUMNS = (
  'model',
  'topology',
  'effort',
  'batch_per_device',
  'step_cycles',
  'step_ms',
  'measured_ms',
  'measured_over_estimate',
  'peak_gib',
  'temp_gib',
  'collective_mib',
  'collective_ms_by_bandwidth',
  'model_flops_utilisation',
  'compile_s',
)


def plan(model: str, topology: str, quick: bool) -> dict:
  """Run the command plan and return its numbers."""
  across, down = (int(n) for n in topology.partition(':')[2].split('x'))
  cores = 2 * across * down
  command = [
    sys.executable,
    '-m',
    'nfnet_jax.experiments.plan',
    '--config=f0',
    f'--config.model.name={model}',
    f'--config.batch_size={IMAGES * cores}',
    f'--topology={topology}',
    '--json',
    # The measured code has no fast paths.
    '--config.run.fast_paths=none',
    *(['--quick'] if quick else []),
  ]
  return json.loads(subprocess.check_output(command, text=True))


def make_row(row: dict) -> dict:
  """Return a plan's numbers with the measured step time."""
  measured = MEASURED[row['model']]
  ratio = measured / row['step_ms']
  return {
    **{name: row[name] for name in COLUMNS if name in row},
    'step_ms': f'{row["step_ms"]:.1f}',
    'measured_ms': measured,
    'measured_over_estimate': f'{ratio:.3f}',
    'peak_gib': f'{row["peak_bytes"] / 2**30:.2f}',
    'temp_gib': f'{row["temp_bytes"] / 2**30:.2f}',
    'collective_mib': f'{row["collective_bytes"] / 2**20:.1f}',
    'collective_ms_by_bandwidth': f'{row["collective_ms_by_bandwidth"]:.2f}',
    'model_flops_utilisation': f'{row["model_flops_utilisation"]:.3f}',
    'compile_s': f'{row["compile_s"]:.0f}',
  }


def write(rows: list[dict], path: pathlib.Path) -> None:
  with path.open('w', newline='') as file:
    writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)


def draw(rows: list[dict], path: pathlib.Path) -> None:
  """Draw measured over estimated step times."""
  figure, axis = plt.subplots(figsize=(6, 4), layout='constrained')
  for row in rows:
    x, y = float(row['step_ms']), row['measured_ms']
    axis.plot(x, y, 'o', color='C0')
    name = row['model'].removeprefix('nfnet_')
    axis.annotate(name, (x, y), (6, -9), textcoords='offset points')
  ends = [0, 1.2 * max(float(row['step_ms']) for row in rows)]
  axis.plot(ends, ends, 'k--', lw=1, label='as estimated')
  axis.set(xlabel='estimated ms', ylabel='measured ms')
  axis.set_title('Step of 32 images per core on TPU v3')
  axis.grid(alpha=0.3)
  axis.legend()
  figure.savefig(path, dpi=110)
  plt.close(figure)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('models', nargs='*', default=list(MEASURED)[:4])
  parser.add_argument('--topology', default='v3:2x2')
  parser.add_argument('--quick', action='store_true')
  parser.add_argument('--out', type=pathlib.Path, default=HERE)
  args = parser.parse_args()
  rows = []
  for model in args.models:
    rows.append(make_row(plan(model, args.topology, args.quick)))
    print(*rows[-1].values(), sep='  ', flush=True)
  ratios = [float(row['measured_over_estimate']) for row in rows]
  print(
    f'measured over estimate: {min(ratios):.3f} to {max(ratios):.3f}, '
    f'mean {statistics.mean(ratios):.3f}, deviation '
    f'{statistics.pstdev(ratios):.3f}'
  )
  write(rows, args.out / 'results.csv')
  draw(rows, args.out / 'results.png')


if __name__ == '__main__':
  main()
