"""Sum the time of a traced training step by its parts, beside the least time.

  python experiments/gpu_step/kernels.py train-nfnet_f0-128

Reads NAME.xplane.pb.gz and NAME.hlo.txt.gz, which `measure.py --profile FORM`
writes, and writes kernels.csv, kernels.png and roofline.png, and the table of
README.md. With `--report` it only draws the contents of kernels.csv.
"""

import argparse
import collections
from collections.abc import Iterator
import csv
import gzip
import pathlib
import re

import jax
import matplotlib

matplotlib.use('agg')
from matplotlib import pyplot as plt
import programs
import results
import roofline

from nfnet_jax.planning import hlo

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
PRODUCT = re.compile(r'cudnn|gemm')
COLORS = {
  'forward, convolutions': '#0072B2',
  'backward, convolutions': '#56B4E9',
  'forward, other': '#D55E00',
  'backward, other': '#E69F00',
  'weight standardisation': '#009E73',
  'update': '#CC79A7',
  'copies and layouts': '#999999',
}


def part_of(instruction: str, op_name: str) -> str:
  """Return the part of the step that an instruction belongs to."""
  part = next(part for part, mark in PARTS.items() if mark in op_name)
  if part not in ('forward', 'backward'):
    return part
  kind = 'convolutions' if PRODUCT.match(instruction) else 'other'
  return f'{part}, {kind}'


def read_trace(trace: bytes, program: hlo.Program) -> list[dict]:
  """Return one row per instruction of the step that ran as kernels.

  The compiler reuses a kernel for equal instructions; they share one row.
  """
  ops = {
    name: op
    for computation in program.computations.values()
    for name, op in computation.ops.items()
  }
  times, counts = collections.Counter(), collections.Counter()
  for kernel, instruction, nanoseconds in _events(trace):
    # Kernels of CUDA graphs have only their own name.
    if instruction not in ops:
      instruction = re.sub(r'_(\d+)$', r'.\1', kernel)
    times[instruction] += nanoseconds / 1e6 / programs.WINDOW
    counts[instruction] += 1 / programs.WINDOW
  return [
    {
      'instruction': name,
      'part': part_of(name, ops[name].op_name if name in ops else ''),
      'ms': f'{ms:.5f}',
      'kernels': round(counts[name]),
      **_costs(program, ops, name, round(counts[name])),
    }
    for name, ms in times.most_common()
  ]


def _events(trace: bytes) -> Iterator[tuple[str, str, float]]:
  """Yield name, instruction and nanoseconds of each kernel."""
  profile = jax.profiler.ProfileData.from_serialized_xspace(trace)
  (device,) = [plane for plane in profile.planes if 'GPU' in plane.name]
  (stream,) = [line for line in device.lines if 'Compute' in line.name]
  for event in stream.events:
    instruction = dict(event.stats).get('hlo_op') or ''
    yield event.name, instruction, event.duration_ns


def _costs(program: hlo.Program, ops: dict, name: str, count: int) -> dict:
  """Return what all kernels of an instruction compute and move in a step."""
  if name not in ops:  # A copy.
    return {'gflop': 0, 'mb': 0}
  # cuDNN may run several kernels for one call.
  times = 1 if ops[name].opcode == 'custom-call' else count
  operations = roofline.count_operations(program, ops, ops[name])
  moved = roofline.count_bytes(ops, ops[name])
  return {
    'gflop': f'{times * operations / 1e9:.4g}',
    'mb': f'{times * moved / 1e6:.4g}',
  }


def write(rows: list[dict], path: pathlib.Path) -> None:
  with path.open('w', newline='') as file:
    writer = csv.DictWriter(file, rows[0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)


def summarize(
  rows: list[dict], tflops: float, tbytes: float
) -> dict[str, dict]:
  """Return the sums of each part, the slowest part first."""
  parts = collections.defaultdict(collections.Counter)
  for row in rows:
    parts[row['part']].update(
      ms=float(row['ms']),
      kernels=int(row['kernels']),
      tflop=float(row['gflop']) / 1e3,
      gb=float(row['mb']) / 1e3,
      least=least_of(row, tflops, tbytes),
    )
  return dict(sorted(parts.items(), key=lambda part: -part[1]['ms']))


def least_of(row: dict, tflops: float, tbytes: float) -> float:
  return roofline.least_ms(
    1e9 * float(row['gflop']),
    1e6 * float(row['mb']),
    'convolutions' in row['part'],
    tflops,
    tbytes,
  )


def table(parts: dict[str, dict]) -> str:
  total = collections.Counter()
  for part in parts.values():
    total.update(part)
  lines = ['| part | kernels | TFLOP | GB | ms | least ms | share |']
  lines += ['| --- | ---: | ---: | ---: | ---: | ---: | ---: |']
  for name, part in [*parts.items(), ('all', total)]:
    least = f'{part["least"]:.2f} | {part["least"] / part["ms"]:.2f}'
    lines.append(
      f'| {name} | {part["kernels"]:,} | {part["tflop"]:.2f} | '
      f'{part["gb"]:.1f} | {part["ms"]:.2f} | {least} |'
    )
  return '\n'.join(lines) + '\n'


def draw_parts(parts: dict[str, dict], title: str, path: pathlib.Path) -> None:
  """Draw the milliseconds of each part, and the least ones inside."""
  figure, axis = plt.subplots(figsize=(8, 3), layout='constrained')
  names = [*parts][::-1]
  times = [parts[name]['ms'] for name in names]
  bars = axis.barh(names, times, color='#9ecae1', label='measured')
  least = [parts[name]['least'] for name in names]
  axis.barh(names, least, 0.4, color='#08519c', label='least')
  labels = [
    f'{parts[name]["ms"]:.2f} ms, {parts[name]["kernels"]} kernels'
    for name in names
  ]
  axis.bar_label(bars, labels, padding=3, fontsize=8)
  axis.margins(x=0.25)
  axis.spines[['top', 'right']].set_visible(False)
  axis.legend(loc='lower right', fontsize=8)
  axis.set_xlabel('milliseconds per step on the GPU')
  axis.set_title(title, fontsize=9)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def draw_roofline(
  rows: list[dict], tflops: float, tbytes: float, title: str, path: pathlib.Path
) -> None:
  """Draw the rate of each instruction over its operations per byte."""
  figure, axis = plt.subplots(figsize=(8, 5), layout='constrained')
  for part, color in COLORS.items():
    inside = [
      row for row in rows if row['part'] == part and float(row['gflop'])
    ]
    rates = [float(row['gflop']) / float(row['ms']) for row in inside]
    intensities = [
      1e3 * float(row['gflop']) / float(row['mb']) for row in inside
    ]
    areas = [400 * float(row['ms']) for row in inside]
    axis.scatter(
      intensities, rates, areas, color=color, alpha=0.6, lw=0, label=part
    )
  ridge = tflops / tbytes
  ends = [0.02, ridge, 3000]
  axis.plot(ends, [min(tbytes * x, tflops) for x in ends], color='k', lw=1)
  axis.set(
    xscale='log',
    yscale='log',
    xlim=(ends[0], ends[-1]),
    ylim=(1e-3, 2 * tflops),
    xlabel='operations per byte of arguments and results',
    ylabel='10¹² operations per second',
  )
  axis.spines[['top', 'right']].set_visible(False)
  legend = axis.legend(loc='lower right', fontsize=8, title='area: time')
  for handle in legend.legend_handles:
    handle.set_sizes([40])
  axis.set_title(title, fontsize=9)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('name', help='task, model and batch of the trace')
  parser.add_argument('--folder', type=pathlib.Path, default=HERE)
  parser.add_argument('--report', action='store_true', help='only draw')
  parser.add_argument(
    '--tflops',
    type=float,
    default=730,
    help='1e12 operations per second of a large product of matrices; '
    'results.csv has the rate of every run',
  )
  parser.add_argument(
    '--tbytes',
    type=float,
    default=3.35,
    help="1e12 bytes per second of the GPU's memory; the default is NVIDIA's "
    'figure for the H100 SXM',
  )
  args = parser.parse_args()
  path = args.folder / 'kernels.csv'
  if not args.report:
    files = [
      args.folder / f'{args.name}.{x}.gz' for x in ('xplane.pb', 'hlo.txt')
    ]
    for file in files:
      if not file.exists():
        parser.error(f'no {file}: run measure.py --profile, or use --report')
    trace, text = (gzip.decompress(file.read_bytes()) for file in files)
    write(read_trace(trace, hlo.parse(text.decode())), path)
  with path.open(newline='') as file:
    rows = list(csv.DictReader(file))
  rates = args.tflops, args.tbytes
  title = f'{args.name}: {args.tflops:g} TFLOP/s, {args.tbytes:g} TB/s'
  parts = summarize(rows, *rates)
  draw_parts(parts, title, args.folder / 'kernels.png')
  draw_roofline(rows, *rates, title, args.folder / 'roofline.png')
  results.replace_table(args.folder, 'parts', table(parts))


if __name__ == '__main__':
  main()
