"""Measure delivered images per second when each image gives several examples.

  python experiments/input_pipeline/multiplicity.py

The photos, the recipe and the batch are those of measure.py. All forms take
turns in every round. Writes multiplicity.csv.
"""

import argparse
import os
import statistics
import tempfile

import measure

AUGMENTS = {
  'RandAugment': measure.RANDAUGMENT,
  'AutoAugment': {'augment': 'autoaugment'},
  'none': {},
}
# Augmentation, whether examples are mixed, and examples per image.
FORMS = [
  *[('RandAugment', True, k) for k in (1, 2, 4, 16)],
  *[('RandAugment', False, k) for k in (1, 2, 4, 16)],
  ('AutoAugment', False, 1),
  ('none', False, 1),
]


def options_of(augment: str, mixed: bool, multiplicity: int) -> dict:
  """Return a form's options of `Augmentation`."""
  mix = measure.MIX if mixed else {}
  options = measure.RECIPE | mix | AUGMENTS[augment]
  return options | {'multiplicity': multiplicity}


def time_forms(rounds: int, seconds: float, source) -> list[dict]:
  """Time every form in every round; return one row per form."""
  walls = {form: [] for form in FORMS}
  for number in range(rounds):
    for form in FORMS:
      batches = measure.train_batches(source, options_of(*form))
      for _ in range(4):  # Builds the graph and fills the buffers.
        next(batches)
      walls[form].append(measure.time_stage(batches, seconds)[0])
      print(number, *form, f'{1 / walls[form][-1]:.0f} images/s', flush=True)
  return [_row(form, walls) for form in FORMS]


def _row(form: tuple, walls: dict[tuple, list]) -> dict:
  augment, mixed, multiplicity = form
  base = walls[augment, mixed, 1]
  gains = [one / wall for one, wall in zip(base, walls[form])]
  rate = 1 / statistics.median(walls[form])
  return {
    'augment': augment,
    'mixed': mixed,
    'multiplicity': multiplicity,
    'images_per_s': round(rate, 1),
    'images_per_s_core': round(rate / len(os.sched_getaffinity(0)), 1),
    'rate_to_one': round(statistics.median(gains), 2),
    'least': round(min(gains), 2),
    'most': round(max(gains), 2),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--seconds', type=float, default=2.0)
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as data_dir:
    source = measure.build(data_dir)
    rows = time_forms(arguments.rounds, arguments.seconds, source)
  measure.write_rows('multiplicity.csv', rows)
  for row in rows:
    print(*row.values())


if __name__ == '__main__':
  main()
