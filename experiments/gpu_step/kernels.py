"""Sum the time of a traced training step by its parts.

  python experiments/gpu_step/kernels.py train-nfnet_f0-128

Reads NAME.xplane.pb.gz and NAME.hlo.txt.gz, which `measure.py --profile FORM`
writes, and writes kernels.csv and kernels.png.
"""

import argparse
import collections
import csv
import gzip
import pathlib
import re

import jax
import matplotlib

matplotlib.use('agg')
from matplotlib import pyplot as plt
import programs

HERE = pathlib.Path(__file__).parent
# Part of the step -> what the `op_name` of its instructions contains. The first
# that fits counts.
PARTS = {
  'weight standardisation': 'standardize',
  'backward': 'transpose(jvp',
  'forward': 'jvp(',
  'update': '/update/',
  'copies and layouts': '',
}
CONVOLUTION = re.compile(r'cudnn|gemm')


def read_names(hlo: str) -> dict[str, str]:
  """Return the `op_name` of every instruction of an HLO text."""
  names = {}
  for line in hlo.splitlines():
    match = re.match(r'\s*(?:ROOT )?%?([\w.\-]+) = ', line)
    if match:
      found = re.search(r'op_name="([^"]*)"', line)
      names[match[1]] = found[1] if found else ''
  return names


def part_of(kernel: str, instruction: str, names: dict[str, str]) -> str:
  """Return the part of the step and the kind of a kernel."""
  if (
    instruction not in names
  ):  # Kernels of CUDA graphs have only their own name.
    instruction = re.sub(r'_(\d+)$', r'.\1', kernel)
  name = names.get(instruction, '')
  part = next(part for part, mark in PARTS.items() if mark in name)
  if part not in ('forward', 'backward'):
    return part
  is_product = CONVOLUTION.match(instruction)
  return f'{part}, {"convolutions" if is_product else "other"}'


def summarize(trace: bytes, names: dict[str, str]) -> list[dict]:
  """Return milliseconds and kernels per step, by part."""
  profile = jax.profiler.ProfileData.from_serialized_xspace(trace)
  (device,) = [plane for plane in profile.planes if 'GPU' in plane.name]
  (stream,) = [line for line in device.lines if 'Compute' in line.name]
  times, counts = collections.Counter(), collections.Counter()
  for event in stream.events:
    instruction = dict(event.stats).get('hlo_op') or ''
    part = part_of(event.name, instruction, names)
    times[part] += event.duration_ns / 1e6 / programs.WINDOW
    counts[part] += 1 / programs.WINDOW
  return [
    {'part': part, 'ms': f'{ms:.2f}', 'kernels': round(counts[part])}
    for part, ms in times.most_common()
  ]


def draw(rows: list[dict], title: str, path: pathlib.Path) -> None:
  """Draw the milliseconds of each part."""
  figure, axis = plt.subplots(figsize=(8, 2.6), layout='constrained')
  bars = axis.barh(
    [row['part'] for row in rows][::-1],
    [float(row['ms']) for row in rows][::-1],
    color='#0072B2',
  )
  labels = [f'{row["ms"]} ms, {row["kernels"]} kernels' for row in rows][::-1]
  axis.bar_label(bars, labels, padding=3, fontsize=8)
  axis.margins(x=0.25)
  axis.spines[['top', 'right']].set_visible(False)
  axis.set_xlabel('milliseconds per step on the GPU')
  axis.set_title(title, fontsize=9)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('name', help='task, model and batch of the trace')
  parser.add_argument('--folder', type=pathlib.Path, default=HERE)
  args = parser.parse_args()
  trace, hlo = (
    gzip.decompress((args.folder / f'{args.name}.{suffix}.gz').read_bytes())
    for suffix in ('xplane.pb', 'hlo.txt')
  )
  rows = summarize(trace, read_names(hlo.decode()))
  with (args.folder / 'kernels.csv').open('w', newline='') as file:
    writer = csv.DictWriter(file, rows[0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
  draw(rows, args.name, args.folder / 'kernels.png')
  for row in rows:
    print(*row.values())


if __name__ == '__main__':
  main()
