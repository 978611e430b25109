"""Measure delivered images per second for photos of three sizes.

  python experiments/input_pipeline/large_photos.py

Photos of 0.2, 2 and 12 megapixels, decoded as they are and with
`jpeg_scaling`, cropped and resized as in F0's recipe. All forms take turns in
every round. Also measures how much scaling changes a training image. Writes
large_photos.csv.
"""

import argparse
import os
import statistics
import tempfile

import measure
import numpy as np

# Width in pixels of photos of 4 : 3.
WIDTHS = {'0.2': 500, '2': 1633, '12': 4000}
PHOTOS = 16


def batches_of(source, scaling: bool):
  """Return batches of cropped images, without end."""
  return measure.train_batches(
    source, measure.RECIPE | {'jpeg_scaling': scaling}
  )


def time_forms(sources: dict, rounds: int, seconds: float) -> list[dict]:
  """Time both forms of all sizes in every round; return one row per size."""
  walls = {(size, scaling): [] for size in sources for scaling in (False, True)}
  for _ in range(rounds):
    for size, scaling in walls:
      batches = batches_of(sources[size], scaling)
      for _ in range(2):  # Builds the graph and fills the buffers.
        next(batches)
      wall, _ = measure.time_stage(batches, seconds)
      walls[size, scaling].append(wall)
  return [_row(size, source, walls) for size, source in sources.items()]


def _row(size: str, source, walls: dict) -> dict:
  gains = [
    whole / scaled
    for whole, scaled in zip(walls[size, False], walls[size, True])
  ]
  cores = len(os.sched_getaffinity(0))
  rates = [
    1 / statistics.median(walls[size, form]) / cores for form in (False, True)
  ]
  return {
    'megapixels': size,
    'images_per_s_core': round(rates[0], 1),
    'scaled_images_per_s_core': round(rates[1], 1),
    'gain': round(statistics.median(gains), 2),
    'least': round(min(gains), 2),
    'most': round(max(gains), 2),
    **difference(source),
  }


def difference(source) -> dict[str, float]:
  """Compare images of the two forms, which have the same crops."""
  plain, scaled = (
    np.clip(next(batches_of(source, form))['image'], 0, 255)
    for form in (False, True)
  )
  rough, smooth = (np.abs(np.diff(x, axis=2)).mean() for x in (plain, scaled))
  return {
    'mean_difference': round(float(np.abs(plain - scaled).mean()), 2),
    'contrast_of_neighbours': round(float(smooth / rough), 3),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--seconds', type=float, default=2.0)
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    sources = {
      size: measure.build(f'{folder}/{size}', width, PHOTOS)
      for size, width in WIDTHS.items()
    }
    rows = time_forms(sources, arguments.rounds, arguments.seconds)
  measure.write_rows('large_photos.csv', rows)
  for row in rows:
    print(*row.values())


if __name__ == '__main__':
  main()
