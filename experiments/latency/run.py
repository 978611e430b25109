"""Plan the step time of every network in the paper's tables of latencies.

  python -m experiments.latency.run

Needs libtpu (`pip install '.[plan]'`), and no TPU.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import resource
import subprocess
import sys
from typing import Any

import pandas as pd
import tqdm

from experiments.studies import figures, study, tables
from nfnet_jax import errors

TOPOLOGY, CORES, IMAGES = 'v3:2x2', 8, 32
PLAIN, FAST = 'plain', 'fast'
FORMS = {PLAIN: ['--config.run.fast_paths=none'], FAST: []}


@dataclasses.dataclass(frozen=True)
class Network:
  """A row of the paper's tables 3 and 6.

  Attributes:
    name: as the paper calls it.
    family: rows with the same family form a line of the figure.
    config: its configuration.
    model: name of the model.
    measured_ms: by the authors, 32 images on each of 32 TPU v3 devices.
    top1: ImageNet top-1 in percent that the authors report.
    forms: forms of the step that are planned.
    remat: whether blocks are recomputed so that the step fits. Networks with
      batch normalisation cannot be cut into microbatches; the configs of NFNets
      choose themselves how they fit.
  """

  name: str
  family: str
  config: str
  model: str
  measured_ms: float
  top1: float
  forms: tuple[str, ...] = (PLAIN,)
  remat: bool = False


def _resnet(name: str, model: str, measured_ms: float, top1: float) -> Network:
  return Network(name, name, f'resnet:{model}', model, measured_ms, top1)


def _efficientnet(number: int, measured_ms: float, top1: float) -> Network:
  return Network(
    f'EfficientNet-B{number}',
    'EfficientNet',
    f'efficientnet:b{number}',
    f'efficientnet_b{number}',
    measured_ms,
    top1,
    (PLAIN, FAST) if number == 7 else (PLAIN,),
    remat=number >= 5,
  )


def _nfnet(number: int, measured_ms: float, top1: float) -> Network:
  return Network(
    f'NFNet-F{number}',
    'NFNet',
    f'f{number}',
    f'nfnet_f{number}',
    measured_ms,
    top1,
    (PLAIN, FAST) if number <= 3 else (PLAIN,),
  )


def _with_bn(number: int, measured_ms: float, top1: float) -> Network:
  return Network(
    f'NFNet-F{number} with BN',
    'NFNet with BN',
    f'ladder:f{number}_bn',
    f'nfnet_f{number}_bn',
    measured_ms,
    top1,
  )


# Tables 3 and 6 of arXiv 2102.06171. F6 is left out: compiling its step, which
# includes SAM, takes more than 22 GB of memory.
TABLE_3 = (
  _resnet('ResNet-50', 'resnet50', 41.6, 78.6),
  _resnet('SENet-50', 'senet50', 64.3, 79.4),
  _efficientnet(0, 51.1, 77.1),
  _efficientnet(3, 129.5, 81.6),
  _efficientnet(4, 245.9, 82.9),
  _efficientnet(5, 450.5, 83.7),
  _efficientnet(6, 775.7, 84.0),
  _efficientnet(7, 1397.0, 84.7),
  _nfnet(0, 73.3, 83.6),
  _nfnet(1, 158.5, 84.7),
  _nfnet(2, 295.8, 85.1),
  _nfnet(3, 532.2, 85.7),
  _nfnet(4, 1033.3, 85.9),
  _nfnet(5, 1398.5, 86.0),
)
TABLE_6 = (
  _with_bn(0, 111.7, 83.4),
  _with_bn(1, 258.0, 84.4),
  _with_bn(2, 396.3, 85.1),
  _with_bn(3, 617.7, 85.5),
)


def answer(options: study.Options) -> str:
  """Plan what has not been planned, draw, and return the verdict."""
  networks = [*TABLE_3, *TABLE_6]
  if options.quick:
    networks = [
      dataclasses.replace(network, forms=(PLAIN,))
      for network in networks
      if network.model == 'nfnet_f0'
    ]
  rows = plan_all(networks, options)
  draw_latencies(rows, options.folder)
  if not options.quick:
    draw_slowdown(rows, options.folder)
  return verdict(rows)


def plan_all(networks: list[Network], options: study.Options) -> pd.DataFrame:
  """Plan every form of networks that the table lacks; return all rows."""
  path = options.folder / 'results.csv'
  rows = tables.read(path)
  done = set() if rows.empty else set(zip(rows.network, rows.form))
  missing = [
    (network, form)
    for network in networks
    for form in network.forms
    if (network.name, form) not in done
  ]
  for network, form in tqdm.tqdm(missing, unit='plan'):
    row = plan(network, form)
    rows = pd.concat([rows, pd.DataFrame([row])], ignore_index=True)
    tables.write(path, rows)
    minutes = rows.core_seconds.sum() / 60
    tables.write_machine(options.folder, minutes)
  return rows


def plan(network: Network, form: str) -> dict[str, Any]:
  """Run the command plan, and return a row."""
  command = [
    sys.executable,
    '-m',
    'nfnet_jax.experiments.plan',
    f'--config={network.config}',
    f'--config.batch_size={IMAGES * CORES}',
    f'--config.data.shards={CORES}',
    '--config.compute_dtype=bfloat16',
    f'--topology={TOPOLOGY}',
    '--quick',  # A third of the time, for about a tenth more cycles.
    '--json',
    *FORMS[form],
    *(['--config.run.remat=True'] if network.remat else []),
  ]
  before = _core_seconds()
  numbers = json.loads(subprocess.check_output(command, text=True))
  if not numbers['fits']:
    raise errors.RunError(f'{network.name} ({form}) needs too much memory.')
  return {
    'network': network.name,
    'family': network.family,
    'form': form,
    'microbatches': numbers['accumulate'],
    'remat': numbers['remat'],
    'm_cycles': round(numbers['step_cycles'] / 1e6, 2),
    'planned_ms': round(numbers['step_ms'], 1),
    'chip_hours': round(numbers['chip_hours']),
    'measured_ms': network.measured_ms,
    'top1': network.top1,
    'core_seconds': round(_core_seconds() - before),
  }


def _core_seconds() -> float:
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime


def draw_latencies(rows: pd.DataFrame, folder: pathlib.Path) -> None:
  """Draw accuracy by measured and planned latency, and their ratio."""
  figure, axes = figures.subplots(columns=3)
  measured, planned, ratio = axes.flat
  table_3 = rows[rows.family != 'NFNet with BN']
  plain, fast = (table_3[table_3.form == form] for form in FORMS)
  for family, mine in plain.groupby('family', sort=False):
    figures.line(measured, mine.measured_ms, mine.top1, family)
    figures.line(planned, mine.planned_ms, mine.top1, family)
    figures.line(
      ratio, mine.planned_ms, mine.measured_ms / mine.planned_ms, family
    )
  nfnets = fast[fast.family == 'NFNet']
  if not nfnets.empty:
    figures.line(
      planned,
      nfnets.planned_ms,
      nfnets.top1,
      'NFNet',
      dashed=True,
      label='NFNet, fast paths',
    )
  for axis in axes.flat:
    axis.set(xscale='log', xlabel='ms per step of 32 images per core')
  measured.set_ylabel('ImageNet top-1 (%), reported')
  ratio.set_ylim(bottom=0)
  figures.titles(
    axes.flat,
    ('measured by the authors', 'planned', 'measured / planned ms'),
  )
  figures.legend_below(figure, planned)
  figures.save(figure, folder, 'results.png')


def slowdown(rows: pd.DataFrame) -> pd.DataFrame:
  """Return how much slower F0 to F3 are with batch normalisation.

  Returns:
    Rows F0 to F3, columns `planned` and `measured`: 0.5 is half as slow again.
  """
  plain = rows[rows.form == PLAIN].set_index('network')
  pairs = {f'F{n}': (f'NFNet-F{n} with BN', f'NFNet-F{n}') for n in range(4)}
  return pd.DataFrame(
    {
      column: {
        name: plain[f'{column}_ms'][bn] / plain[f'{column}_ms'][nf] - 1
        for name, (bn, nf) in pairs.items()
      }
      for column in ('planned', 'measured')
    }
  )


def draw_slowdown(rows: pd.DataFrame, folder: pathlib.Path) -> None:
  """Draw the planned and measured cost of batch normalisation."""
  figure, axes = figures.subplots(columns=1)
  table = 100 * slowdown(rows)
  places = range(len(table))
  for shift, column in ((-0.2, 'planned'), (0.2, 'measured')):
    figures.bars(
      axes[0, 0], [place + shift for place in places], table[column], column
    )
  axes[0, 0].set_xticks(places, table.index)
  axes[0, 0].set_ylabel('slower with BN (%)')
  axes[0, 0].legend()
  figures.save(figure, folder, 'normalisation.png')


def verdict(rows: pd.DataFrame) -> str:
  """Return what the plans show, in sentences."""
  known = rows[rows.form == PLAIN]
  ratios = known.measured_ms / known.planned_ms
  text = [
    f'Measured steps took {ratios.min():.2f} to {ratios.max():.2f} times as '
    f'long as planned ({len(ratios)} rows).'
  ]
  if 'EfficientNet-B7' in set(rows.network):
    planned = rows.pivot(index='network', columns='form', values='planned_ms')
    faster = planned.loc['EfficientNet-B7'] / planned.loc['NFNet-F1']
    ms = known.set_index('network').measured_ms
    text.append(
      f'By the plans F1 is {faster[PLAIN]:.1f} (plain) and {faster[FAST]:.1f} '
      '(fast) times as fast as B7; the authors measured '
      f'{ms["EfficientNet-B7"] / ms["NFNet-F1"]:.1f}.'
    )
  if 'NFNet-F3 with BN' in set(rows.network):
    table = slowdown(rows)
    parts = [
      f'{name} {row.planned:+.0%} (measured {row.measured:+.0%})'
      for name, row in table.iterrows()
    ]
    text.append(f'Batch normalisation costs {", ".join(parts)}.')
  return ' '.join(text)


if __name__ == '__main__':
  study.main(
    'How long do steps of NFNets and their baselines take, by the compiler?',
    pathlib.Path(__file__).parent,
    answer,
  )
