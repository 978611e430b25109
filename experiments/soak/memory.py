"""Sample memory, open files and threads of a long run of a small network.

  python -m experiments.soak.memory

Trains for 20,000 steps with evaluations and checkpoints. Writes memory.csv and
memory.png.
"""

import argparse
import contextlib
import csv
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from nfnet_jax import plotting

HERE = pathlib.Path(__file__).parent
RECIPE = (
  '--config=digits',
  '--config.model.name=nfnet_pico',
  '--config.batch_size=8',
  '--config.run.log_every=100 steps',
  '--config.run.eval_every=1000 steps',
  '--config.run.checkpoint_every=500 steps',
)
TITLES = {
  'resident_mib': 'resident, MiB',
  'allocated_mib': 'allocated, MiB',
  'python_blocks': 'blocks of Python objects',
  'files': 'open files',
  'threads': 'threads',
}
# Panels of the figure.
PANELS = {
  'memory, MiB': ('resident_mib', 'allocated_mib'),
  'blocks of Python objects': ('python_blocks',),
  'open files': ('files',),
  'threads': ('threads',),
}


def sample(process: int, held: pathlib.Path) -> dict[str, float]:
  """Return what a process uses now.

  Args:
    process: its number.
    held: the file in which it reports what its program holds.
  """
  folder = pathlib.Path(f'/proc/{process}')
  pages = int((folder / 'statm').read_text().split()[1])
  allocated, blocks = map(int, held.read_text().split())
  return {
    'resident_mib': round(pages * os.sysconf('SC_PAGE_SIZE') / 2**20, 1),
    'allocated_mib': round(allocated / 2**20, 1),
    'python_blocks': blocks,
    'files': len(list((folder / 'fd').iterdir())),
    'threads': len(list((folder / 'task').iterdir())),
  }


def measure(steps: int, interval: float) -> list[dict]:
  """Train, and return a sample for each interval after the first log line."""
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    log, held = pathlib.Path(folder) / 'log', pathlib.Path(folder) / 'held'
    with log.open('w') as file:
      run = subprocess.Popen(
        [
          *(sys.executable, '-m', 'experiments.soak.probed_train', *RECIPE),
          f'--config.train_for={steps} steps',
          f'--workdir={folder}/run',
        ],
        stdout=file,
        stderr=file,
        env=os.environ | {'HELD': str(held)},
      )
    while run.poll() is None:
      time.sleep(interval)
      shown = re.findall(r'^step ([\d,]+)/', log.read_text(), re.M)
      step = int(shown[-1].replace(',', '')) if shown else 0
      if 0 < step < steps:  # It may end at any moment after the last step.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
          rows.append({'step': step, **sample(run.pid, held)})
    if run.returncode:
      raise RuntimeError(log.read_text())
  return rows


def growth(rows: list[dict], name: str) -> tuple[float, float]:
  """Return the medians of the second and of the last tenth of the samples."""
  tenth = max(len(rows) // 10, 1)
  parts = rows[tenth : 2 * tenth] or rows, rows[-tenth:]
  first, last = (sorted(row[name] for row in part) for part in parts)
  return first[len(first) // 2], last[len(last) // 2]


def draw(rows: list[dict], path: pathlib.Path) -> None:
  """Draw the samples over the steps."""
  figure, axes = plotting.subplots(
    1, 4, figsize=(12, 2.8), layout='constrained', squeeze=False
  )
  for axis, (title, names) in zip(axes.flat, PANELS.items()):
    for name in names:
      values = [row[name] for row in rows]
      axis.plot([row['step'] for row in rows], values, label=name)
    axis.set(xlabel='step', title=title)
    axis.set_ylim(bottom=0)
    if len(names) > 1:
      axis.legend(fontsize=8)
  figure.savefig(path, dpi=110)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--steps', type=int, default=20_000)
  parser.add_argument('--interval', type=float, default=2.0)
  parser.add_argument('--out', type=pathlib.Path, default=HERE)
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  rows = measure(args.steps, args.interval)
  with (args.out / 'memory.csv').open('w', newline='') as file:
    writer = csv.DictWriter(file, rows[0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
  draw(rows, args.out / 'memory.png')
  for name, title in TITLES.items():
    early, late = growth(rows, name)
    print(f'{title}: {early:g} early, {late:g} at the end')


if __name__ == '__main__':
  main()
