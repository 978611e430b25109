"""Train with several clipping rules over thresholds, in five settings.

python -m experiments.clipping_rules.run
"""

from __future__ import annotations

import pathlib

import pandas as pd

from experiments.studies import figures, study, sweep, training

SEEDS = (0, 1, 2)
EPOCHS, SIZE = 50, 16
_SMALL, _DEEP = 'nf_resnet_pico', 'nf_resnet38'
# Setting -> model, batch and learning rate.
SETTINGS = {
  'first': (_SMALL, 64, 0.4),
  'rate x 4': (_SMALL, 64, 1.6),
  'batch x 8': (_SMALL, 512, 0.4),
  'batch, rate x 4': (_SMALL, 256, 1.6),
  '12 blocks': (_DEEP, 64, 0.4),
}
_RATIOS = (0.0025, 0.01, 0.04, 0.16, 0.64)
# Rule -> its settings and thresholds.
RULES = {
  'AGC': ({'optimizer.clip_by': 'unit'}, _RATIOS),
  'input unit': ({'optimizer.clip_by': 'input_unit'}, _RATIOS),
  'layer': ({'optimizer.clip_by': 'layer'}, _RATIOS),
  'global norm': (
    {'optimizer.clip_by': 'global_norm'},
    (0.0625, 0.25, 1.0, 4.0, 16.0),
  ),
  'LARS': ({'optimizer.clipping': 0.0}, (0.001, 0.004, 0.016, 0.064, 0.256)),
  'none': ({'optimizer.clipping': 0.0}, (0.0,)),
}


def runs(quick: bool) -> list[training.Run]:
  """Return the runs over rules, thresholds, settings and seeds."""
  return [
    _run(rule, threshold, name, seed, quick)
    for rule, (_, thresholds) in RULES.items()
    for name in SETTINGS
    for threshold in thresholds
    for seed in (SEEDS[:1] if quick else SEEDS)
    if not quick or (rule in ('AGC', 'LARS') and name == 'first')
  ]


def _run(
  rule: str, threshold: float, name: str, seed: int, quick: bool
) -> training.Run:
  model, batch, rate = SETTINGS[name]
  settings, _ = RULES[rule]
  varied = (
    'optimizer.trust_coefficient' if rule == 'LARS' else 'optimizer.clipping'
  )
  return training.Run(
    labels={
      'rule': rule,
      'threshold': threshold,
      'setting': name,
      'seed': seed,
    },
    config='digits',
    settings={
      'model.name': model,
      'data.image_size': SIZE,
      'data.eval_size': SIZE,
      'batch_size': batch,
      'dataset': 'digits',
      'seed': seed,
      'train_for': '20 steps' if quick else f'{EPOCHS} epochs',
      'optimizer.learning_rate': rate,
      **({'optimizer.warmup': '2 steps'} if quick else {}),
      **settings,
      varied: threshold,
    },
  )


def answer(options: study.Options) -> str:
  """Train, draw, and return the verdict."""
  rows, _ = sweep.sweep(runs(options.quick), options.folder, options.workers)
  draw(rows, options.folder)
  return verdict(rows)


def draw(rows: pd.DataFrame, folder: pathlib.Path) -> None:
  """Draw a map of threshold and setting for every rule."""
  rules = [rule for rule in RULES if rule in set(rows.rule) and rule != 'none']
  figure, axes = figures.subplots(columns=len(rules), sharey=True)
  for axis, rule in zip(axes.flat, rules):
    table = 100 * means(rows, rule)
    image = figures.heat_map(axis, table, vmin=0, vmax=100)
    figures.write_values(axis, table, '.0f')
    axis.set_xlabel('threshold')
    axis.tick_params(axis='x', labelrotation=90)
  figure.colorbar(image, ax=axes, label='held-out top-1 (%)')
  figures.titles(axes.flat, rules)
  figures.save(figure, folder, 'results.png')


def means(rows: pd.DataFrame, rule: str) -> pd.DataFrame:
  """Return the mean accuracy of a rule, a row per setting."""
  table = rows[rows.rule == rule].pivot_table(
    index='setting', columns='threshold', values='top1'
  )
  return table.loc[[name for name in SETTINGS if name in table.index]]


def verdict(rows: pd.DataFrame) -> str:
  """Return how well one threshold serves all settings, in sentences.

  What a threshold costs in a setting is the best accuracy of any rule and
  threshold there less its own.
  """
  best = rows.groupby(['setting', 'rule', 'threshold']).top1.mean()
  best = best.groupby('setting').max()
  text = []
  for rule in dict.fromkeys(rows.rule):
    table = means(rows, rule)
    cost = (-table).add(best[table.index], axis=0).max()
    own = (best[table.index] - table.max(axis=1)).max()
    text.append(
      f'{rule}: threshold {cost.idxmin():g} costs at most '
      f'{100 * cost.min():.1f} points in any setting, the best threshold of '
      f'each setting {100 * own:.1f}'
    )
  return f'{"; ".join(text)}.'


if __name__ == '__main__':
  study.main(
    'For which clipping rule does one threshold serve best?',
    pathlib.Path(__file__).parent,
    answer,
  )
