"""The rows of results.csv, and the table and the figure made from them."""

import csv
import pathlib
import re

import matplotlib
import numpy as np

matplotlib.use('agg')
from matplotlib import pyplot as plt
import programs

COLUMNS = (
  'task',
  'model',
  'pixels',
  'batch',
  'compute',
  'form',
  'ms',
  'of_first',
  'least',
  'most',
  'images_per_s',
  'mfu',
  'memory_gib',
  'compile_s',
  'steps',
  'note',
  'card',
)
# Columns of the README's table, and those of them that hold text.
SHOWN = tuple(name for name in COLUMNS if name not in ('steps', 'note', 'card'))
WORDS = 'task', 'model', 'compute', 'form'


def read(folder: pathlib.Path) -> list[dict[str, str]]:
  with (folder / 'results.csv').open(newline='') as file:
    return list(csv.DictReader(file))


def write(rows: list[dict], folder: pathlib.Path) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / 'results.csv').open('w', newline='') as file:
    writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)


def table(rows: list[dict]) -> str:
  """Format the rows that have times."""
  lines = [
    [name.replace('_', ' ') for name in SHOWN],
    ['---' if name in WORDS else '---:' for name in SHOWN],
  ]
  lines += [
    [str(row[name]) or '-' for name in SHOWN]
    for row in rows
    if row['form'] and row['ms']
  ]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def draw(rows: list[dict], path: pathlib.Path) -> None:
  """Draw the time of each form relative to the first, by model and batch."""
  groups = {}
  for row in rows:
    if (
      row['task'] == programs.TRAIN
      and row['form'] in programs.FORMS
      and row['of_first']
    ):
      name = row['model'].removeprefix('nfnet_').upper()
      label = f'{name}, {row["pixels"]} px\nbatch {row["batch"]}'
      ratio = float(row['of_first'])
      errors = ratio - float(row['least']), float(row['most']) - ratio
      groups.setdefault(label, {}).setdefault(row['form'], (ratio, errors))
  groups = {label: forms for label, forms in groups.items() if len(forms) > 1}
  if not groups:
    return
  figure, axis = plt.subplots(figsize=(10, 4), layout='constrained')
  for index, form in enumerate(programs.FORMS):
    places, ratios, errors = [], [], []
    for place, forms in enumerate(groups.values()):
      if form in forms:
        places.append(place + (index - len(programs.FORMS) / 2 + 0.5) * 0.14)
        ratios.append(forms[form][0])
        errors.append(forms[form][1])
    if places:
      axis.bar(
        places, ratios, 0.14, yerr=np.transpose(errors), label=form, capsize=2
      )
  axis.axhline(1, color='k', lw=0.8)
  axis.set_ylim(0.7, 1.35)  # Cuts the error bar of a round that stalled.
  axis.set_xticks(range(len(groups)), [*groups], fontsize=8)
  axis.set_ylabel("time per step, share of plain's")
  axis.set_title(rows[0]['card'], fontsize=9)
  axis.legend(fontsize=8, loc='upper right')
  figure.savefig(path, dpi=110)
  plt.close(figure)


def report(folder: pathlib.Path) -> None:
  """Draw the figure, and update the table of the README if there is one."""
  rows = read(folder)
  draw(rows, folder / 'results.png')
  replace_table(folder, 'results', table(rows))


def replace_table(folder: pathlib.Path, name: str, text: str) -> None:
  """Print a table, and write it into the README of the folder if it has one."""
  print(text, end='')
  readme = folder / 'README.md'
  if readme.exists():
    place = rf'(?s)(?<=<!-- {name} -->\n).*?(?=<!-- end -->)'
    readme.write_text(re.sub(place, lambda _: text, readme.read_text()))
