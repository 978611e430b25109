"""Compare the planned cost of a training step with and without fast paths.

Updates results.csv, results.png and the table in README.md next to this file;
rows of other models stay:

  python experiments/fast_step/measure.py nfnet_f0 nfnet_f1
"""

import argparse
import csv
import json
import math
import pathlib
import re
import subprocess
import sys

import matplotlib

from nfnet_jax.planning import topology

matplotlib.use('agg')
from matplotlib import pyplot as plt

HERE = pathlib.Path(__file__).parent
# Form of the step -> flags that select it; the default has all fast paths.
FORMS = {
  'plain': ('--config.run.fast_paths=none',),
  'replicated': ('--config.run.fast_paths=fast_stem,fused_blocks',),
  'fast': (),
}
# M cycles, and GiB of temporaries plus arguments, of the authors' released code
# compiled in the same way: v3:2x2, 32 images per core, full effort.
RELEASED = {
  'nfnet_f0': (55.96, 1.30 + 0.81),
  'nfnet_f1': (122.19, 2.80 + 1.49),
  'nfnet_f2': (210.32, 4.82 + 2.18),
  'nfnet_f3': (379.29, 9.02 + 2.87),
}
RELEASED_ON = 'v3:2x2', 32
# Categories of cycles in the table and figure; see `_categories`.
CATEGORIES = (
  'stem',
  'other convolutions',
  'elementwise and pooling',
  'copies',
  'weight standardisation',
  'AGC',
  'optimiser and EMA',
  'casts',
  'squeeze-excite',
  'the rest',
)
KEY = 'model', 'topology', 'images', 'form'
COLUMNS = (
  *KEY,
  'effort',
  'm_cycles',
  'ratio_to_released',
  'temp_gib',
  'argument_gib',
  'memory_ratio_to_released',
  'sent_mib',
  'compile_s',
  *CATEGORIES,
)
ACROSS = 5  # Panels per row of the figure.
MIB, GIB = 2**20, 2**30


def plan(
  model: str, pod: str, images: int, form: str, quick: bool = False
) -> dict:
  """Run the command plan and return its numbers."""
  layout = pod.partition(':')[2].split('x')
  chips = math.prod(int(length) for length in layout)
  devices = topology.parse(pod).devices_per_chip * chips
  command = [
    sys.executable,
    '-m',
    'nfnet_jax.experiments.plan',
    '--config=f0',
    f'--config.model.name={model}',
    f'--config.batch_size={images * devices}',
    f'--topology={pod}',
    '--json',
    *FORMS[form],
    *(['--quick'] if quick else []),
  ]
  return json.loads(subprocess.check_output(command, text=True))


def make_row(form: str, row: dict) -> dict[str, str]:
  """Return a plan's numbers with those of the released step.

  Raises:
    SystemExit: if the step does not fit.
  """
  if not row['fits']:
    sys.exit(
      f'{row["model"]} in the form {form} does not fit {row["topology"]}: it '
      f'lacks {row["lacking_bytes"] / GIB:.2f} GiB per {row["device"]}.'
    )
  cycles, memory = RELEASED.get(row['model'], (math.nan, math.nan))
  if (row['topology'], row['batch_per_device']) != RELEASED_ON:
    cycles = memory = math.nan
  if row['effort'] != 'full':  # Cycles are pessimistic then, memory is not.
    cycles = math.nan
  temp, argument = row['temp_bytes'] / GIB, row['argument_bytes'] / GIB
  return {
    'model': row['model'],
    'topology': row['topology'],
    'images': str(row['batch_per_device']),
    'form': form,
    'effort': row['effort'],
    'm_cycles': f'{row["step_cycles"] / 1e6:.2f}',
    'ratio_to_released': _known(row['step_cycles'] / 1e6 / cycles),
    'temp_gib': f'{temp:.2f}',
    'argument_gib': f'{argument:.2f}',
    'memory_ratio_to_released': _known((temp + argument) / memory),
    'sent_mib': f'{row["collective_sent_bytes"] / MIB:.0f}',
    'compile_s': f'{row["compile_s"]:.0f}',
    **{
      name: f'{cycles / 1e6:.2f}'
      for name, cycles in _categories(row['cycles']).items()
    },
  }


def _known(ratio: float) -> str:
  return '' if math.isnan(ratio) else f'{ratio:.3f}'


def _categories(cycles: dict[str, dict[str, int]]) -> dict[str, int]:
  """Sum a plan's cycles over both passes and into fewer categories."""
  summed = dict.fromkeys(CATEGORIES, 0)
  for name, passes in cycles.items():
    if name.startswith('convolutions'):
      name = 'stem' if name.endswith('stem') else 'other convolutions'
    elif name.startswith('casts'):
      name = 'casts'
    summed[name if name in CATEGORIES else 'the rest'] += sum(passes.values())
  return summed


def read(path: pathlib.Path) -> list[dict[str, str]]:
  if not path.exists():
    return []
  with path.open(newline='') as file:
    return list(csv.DictReader(file))


def merge(rows: list[dict], made: dict) -> list[dict]:
  """Add a row, or replace the row of the same plan; sort by plan."""
  key = lambda row: [row[name] for name in KEY]
  rows = [row for row in rows if key(row) != key(made)] + [made]
  return sorted(
    rows,
    key=lambda row: (*key(row)[:3], [*FORMS].index(row['form'])),
  )


def write(rows: list[dict], folder: pathlib.Path) -> None:
  """Write the rows, their figure, and their table if there is a README."""
  with (folder / 'results.csv').open('w', newline='') as file:
    writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
  draw(rows, folder / 'results.png')
  readme = folder / 'README.md'
  if readme.exists():
    readme.write_text(fill(readme.read_text(), table(rows)))


def fill(text: str, table: str) -> str:
  """Replace the table between the markers of a text."""
  return re.sub(
    r'(?s)(?<=<!-- results -->\n).*(?=<!-- end -->)', lambda _: table, text
  )


# Column of the table -> function that formats its cell from a row.
_CELLS = {
  'model': lambda row: row['model'].removeprefix('nfnet_').upper(),
  'pod': lambda row: row['topology'],
  'images': lambda row: row['images'],
  'form': lambda row: row['form'],
  'M cycles': lambda row: (
    row['m_cycles'] + (' quick' if row['effort'] == 'quick' else '')
  ),
  'of released cycles': lambda row: row['ratio_to_released'] or '-',
  'temporary + arguments, GiB': lambda row: (
    f'{row["temp_gib"]} + {row["argument_gib"]}'
  ),
  'of released memory': lambda row: row['memory_ratio_to_released'] or '-',
  'sent, MiB': lambda row: row['sent_mib'],
  'compiling, s': lambda row: row['compile_s'],
}


def table(rows: list[dict]) -> str:
  """Format rows for a README."""
  right = ['---'] + ['---'] + ['---:'] + ['---'] + ['---:'] * (len(_CELLS) - 4)
  lines = [[*_CELLS], right]
  lines += [[read(row) for read in _CELLS.values()] for row in rows]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def draw(rows: list[dict], path: pathlib.Path) -> None:
  """Draw cycles by category, plain and fast, a panel per model and pod."""
  groups = {}
  for row in rows:
    if row['form'] != 'replicated':
      group = groups.setdefault(tuple(row[name] for name in KEY[:3]), {})
      group[row['form']] = row
  across = max(min(len(groups), ACROSS), 1)
  down = max(math.ceil(len(groups) / across), 1)
  figure, axes = plt.subplots(
    down,
    across,
    figsize=(2.2 + 2 * across, 3.8 * down),
    layout='constrained',
    squeeze=False,
  )
  for axis, (key, group) in zip(axes.flat, groups.items()):
    _draw_panel(axis, *key, group)
  for axis in axes.flat[len(groups) :]:
    axis.axis('off')
  for axis in axes[:, 0]:
    axis.set_ylabel('M cycles per step')
  handles, names = axes[0, 0].get_legend_handles_labels()
  figure.legend(
    handles[::-1], names[::-1], loc='outside right upper', fontsize=8
  )
  figure.savefig(path, dpi=110)
  plt.close(figure)


def _draw_panel(
  axis, model: str, pod: str, images: str, group: dict[str, dict]
) -> None:
  bottom = [0.0] * len(group)
  for index, name in enumerate(CATEGORIES):
    heights = [float(row[name]) for row in group.values()]
    axis.bar([*group], heights, 0.7, bottom, label=name, color=f'C{index}')
    bottom = [a + b for a, b in zip(bottom, heights)]
  for place, row in enumerate(group.values()):
    axis.annotate(
      row['m_cycles'],
      (place, bottom[place]),
      (0, 2),
      textcoords='offset points',
      ha='center',
      fontsize=8,
    )
  if (pod, int(images)) == RELEASED_ON and model in RELEASED:
    axis.axhline(RELEASED[model][0], color='k', ls='--', lw=1, label='released')
  name = model.removeprefix('nfnet_').upper()
  axis.set_title(f'{name}, {pod}\n{images} images per device', fontsize=9)
  axis.grid(axis='y', alpha=0.3)
  axis.set_axisbelow(True)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('models', nargs='*', default=['nfnet_f0'])
  parser.add_argument('--topology', default='v3:2x2')
  parser.add_argument('--images', type=int, default=32, help='per device')
  parser.add_argument('--forms', nargs='+', choices=FORMS, default=[*FORMS])
  parser.add_argument('--quick', action='store_true')
  parser.add_argument('--out', type=pathlib.Path, default=HERE)
  args = parser.parse_args()
  rows = read(args.out / 'results.csv')
  for model in args.models:
    for form in args.forms:
      made = plan(model, args.topology, args.images, form, args.quick)
      rows = merge(rows, make_row(form, made))
      # After each plan, because a plan takes minutes.
      write(rows, args.out)
  print(table(rows), end='')


if __name__ == '__main__':
  main()
