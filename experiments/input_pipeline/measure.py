"""Measure the cost of each stage of the input pipeline on photo-sized JPEGs.

  python experiments/input_pipeline/measure.py

Builds 512 photos of 500 x 375 pixels and about 110 kB as a TFDS dataset, and
reads them through growing parts of the published recipe for F0 (192 px). All
stages take turns in every round, so that other load affects them equally. Then
it measures memory over twelve epochs, and trains a small network to measure how
long its steps wait for data. Writes results.csv and results.png.
"""

import argparse
import csv
import io
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from nfnet_jax import preprocessing
from nfnet_jax.data import pipeline, sources
from nfnet_jax.training import data_parallel

FOLDER = pathlib.Path(__file__).parent
SIZE, BATCH, PHOTOS = 192, 32, 512
RECIPE = {'crop': 'distorted', 'flip': True}
MIX = {'mixup': True, 'cutmix': True}
RANDAUGMENT = {'randaugment_layers': 4, 'randaugment_magnitude': 5}

# Stage -> its options after reading; None only reads records.
STAGES = {
  'read': None,
  'decode, crop, resize': RECIPE,
  '+ mixing': RECIPE | MIX,
  '+ RandAugment': RECIPE | RANDAUGMENT,
  'all': RECIPE | MIX | RANDAUGMENT,
  'all, partners in batch': (
    RECIPE | MIX | RANDAUGMENT | {'partners': 'in_batch'}
  ),
  'all, fed to the device': RECIPE | MIX | RANDAUGMENT,
}
BASE = 'decode, crop, resize'


def build(
  data_dir: str, width: int = 500, count: int = PHOTOS
) -> sources.Source:
  """Create photos of a width and store them as a TFDS dataset."""
  tfds.dataset_builders.store_as_tfds_dataset(
    name='photos',
    version='1.0.0',
    features=tfds.features.FeaturesDict(
      {
        'image': tfds.features.Image(encoding_format='jpeg'),
        'label': tfds.features.ClassLabel(num_classes=1000),
      }
    ),
    split_datasets={
      'train': [
        (index, {'image': io.BytesIO(photo(index, width)), 'label': index})
        for index in range(count)
      ]
    },
    data_dir=data_dir,
  )
  return sources.load('photos', data_dir)


def photo(seed: int, width: int = 500) -> bytes:
  """Return a JPEG of 4 : 3 of noise of five scales, about 110 kB for 500 px."""
  rng = np.random.default_rng(seed)
  size = width, width * 3 // 4
  pixels = np.full((*size[::-1], 3), 120.0)
  for cells in (4, 8, 16, 40, 120):
    coarse = rng.normal(0, 130 / cells**0.5, (cells * 3 // 4 + 1, cells, 3))
    pixels += _enlarge(coarse.astype(np.float32), size)
  pixels += rng.normal(0, 19, pixels.shape)
  image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
  buffer = io.BytesIO()
  image.save(buffer, 'JPEG', quality=90)
  return buffer.getvalue()


def _enlarge(coarse: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  channels = [Image.fromarray(coarse[..., c]) for c in range(3)]
  kind = Image.Resampling.BICUBIC
  return np.stack([np.asarray(c.resize(size, kind)) for c in channels], -1)


def stream(source: sources.Source, stage: str):
  """Return the batches of a stage, without end."""
  options = STAGES[stage]
  if options is None:
    return _raw_batches(source)
  batches = train_batches(source, options)
  if stage.endswith('device'):
    feed = data_parallel.DataParallel()
    batches = map(feed.shard_batch, batches)
  return batches


def train_batches(source: sources.Source, options: dict):
  """Yield batches with options of `Augmentation`, without end."""
  spec = pipeline.TrainSpec(
    source=source,
    split='train',
    batch_size=BATCH,
    image_size=SIZE,
    shards=1,
    seed=0,
    augmentation=preprocessing.Augmentation(**options),
  )
  return pipeline.train_batches(spec)


def _raw_batches(source: sources.Source):
  from nfnet_jax.data import records

  (slices,) = source.shards('train', 1)
  dataset = records.shard_stream(
    source,
    slices,
    first_slice=0,
    seed=0,
    shard=0,
    shards=1,
    buffer=PHOTOS,
    start=0,
  )
  yield from dataset.batch(BATCH).prefetch(2).as_numpy_iterator()


def time_stage(batches, seconds: float) -> tuple[float, float]:
  """Return wall and processor seconds per delivered image."""
  count, cpu, start = 0, time.process_time(), time.perf_counter()
  while time.perf_counter() - start < seconds:
    jax.block_until_ready(next(batches))
    count += BATCH
  wall = time.perf_counter() - start
  return wall / count, (time.process_time() - cpu) / count


def measure(rounds: int, seconds: float, source: sources.Source) -> list[dict]:
  """Time every stage in every round; return one row per stage."""
  timings = {stage: [] for stage in STAGES}
  for _ in range(rounds):
    for stage in STAGES:
      batches = stream(source, stage)
      for _ in range(4):  # Builds the graph and fills the buffers.
        next(batches)
      timings[stage].append(time_stage(batches, seconds))
  return [_row(stage, timings) for stage in STAGES]


def _row(stage: str, timings: dict[str, list]) -> dict:
  walls, cpus = zip(*timings[stage])
  base = [wall for wall, _ in timings[BASE]]
  ratios = [wall / reference for wall, reference in zip(walls, base)]
  options = STAGES[stage] or {}
  decoded = 2 if 'mixup' in options and 'partners' not in options else 1
  wall = statistics.median(walls)
  ratio = statistics.median(ratios)
  return {
    'stage': stage,
    'images_per_s': round(1 / wall, 1),
    'images_per_s_core': round(1 / wall / len(os.sched_getaffinity(0)), 1),
    'cpu_ms_per_image': round(1e3 * statistics.median(cpus), 3),
    'decoded_per_image': decoded,
    'cost_to_base_per_decoded': round(ratio / decoded, 3),
    'rate_to_base': round(1 / ratio, 3),
    'spread': round((max(ratios) - min(ratios)) / ratio, 3),
  }


def measure_memory(source: sources.Source, epochs: int) -> list[float]:
  """Return the resident memory in MiB after each epoch of raw images."""
  batches = stream(source, 'all')
  resident = []
  for _ in range(epochs):
    for _ in range(PHOTOS // (2 * BATCH)):
      next(batches)
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
    resident.append(pages * os.sysconf('SC_PAGE_SIZE') / 2**20)
  return resident


def train(data_dir: str) -> list[str]:
  """Train nfnet_nano at 192 px; return the lines of progress."""
  with tempfile.TemporaryDirectory() as workdir:
    command = [sys.executable, '-m', 'nfnet_jax.experiments.train']
    command += [
      '--config=f0',
      f'--workdir={workdir}',
      f'--config.run.data_dir={data_dir}',
      '--config.dataset=photos',
      '--config.data.eval_split=train[:32]',
      '--config.model.name=nfnet_nano',
      f'--config.data.image_size={SIZE}',
      f'--config.data.eval_size={SIZE}',
      '--config.data.randaugment_magnitude=5',
      f'--config.batch_size={BATCH}',
      '--config.train_for=60 steps',
      '--config.optimizer.warmup=10 steps',
      '--config.run.log_every=20 steps',
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
  return [line for line in run.stderr.splitlines() if 'img/s' in line]


def write_rows(name: str, rows: list[dict]) -> None:
  """Write rows to a file of the study's folder."""
  with (FOLDER / name).open('w', newline='') as file:
    writer = csv.DictWriter(file, rows[0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)


def plot(rows: list[dict]) -> None:
  """Plot the rate of each stage."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  rows = [row for row in rows if row['stage'] != 'read'][::-1]
  figure, axis = plt.subplots(figsize=(7, 3.2), layout='constrained')
  bars = axis.barh(
    [row['stage'] for row in rows], [row['images_per_s_core'] for row in rows]
  )
  axis.bar_label(
    bars, [f'{row["cpu_ms_per_image"]:.2f} ms' for row in rows], padding=3
  )
  axis.margins(x=0.15)
  axis.set_xlabel(
    'delivered images per second and core (label: processor time)'
  )
  figure.savefig(FOLDER / 'results.png', dpi=120)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--seconds', type=float, default=3.0)
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as data_dir:
    source = build(data_dir)
    rows = measure(arguments.rounds, arguments.seconds, source)
    resident = measure_memory(source, epochs=12)
    progress = train(data_dir)
  write_rows('results.csv', rows)
  plot(rows)
  for row in rows:
    print(row)
  print('MiB after each epoch:', *(f'{mib:.0f}' for mib in resident))
  print(*progress, sep='\n')


if __name__ == '__main__':
  main()
