"""Compare the time of resizing uint8 and float32 images in TensorFlow.

  python experiments/input_pipeline/resize.py

Resizes crops of three sizes to 192 px, in tf.data with two threads. The two
forms take turns. Prints processor milliseconds per image and their ratio, and
writes them to resize.csv next to this file.
"""

import argparse
import csv
import pathlib
import statistics
import time

import numpy as np
import tensorflow as tf

SIZE, BATCH, BATCHES, ROUNDS = 192, 32, 10, 7
SHAPES = (150, 200, 3), (300, 400, 3), (375, 500, 3)


def batches_of(image: tf.Tensor, dtype: tf.DType):
  """Return batches of an image that is resized after a cast."""

  def resize(index: tf.Tensor) -> tf.Tensor:
    varied = image + tf.cast(index % 2, image.dtype)
    return tf.image.resize(tf.cast(varied, dtype), (SIZE, SIZE), 'bicubic')

  numbers = tf.data.Dataset.range(10**9)
  return numbers.map(resize, 2).batch(BATCH).as_numpy_iterator()


def milliseconds(batches) -> float:
  """Return the processor time per image."""
  for _ in range(3):
    next(batches)
  start = time.process_time()
  for _ in range(BATCHES):
    next(batches)
  return 1e3 * (time.process_time() - start) / (BATCH * BATCHES)


def main() -> None:
  argparse.ArgumentParser(description=__doc__).parse_args()
  rows = []
  draw = np.random.default_rng(0).integers
  for shape in SHAPES:
    image = tf.constant(draw(0, 255, shape), tf.uint8)
    forms = tf.uint8, tf.float32
    first, second = (next(batches_of(image, form)) for form in forms)
    np.testing.assert_array_equal(first, second)
    pairs = [
      [milliseconds(batches_of(image, form)) for form in forms]
      for _ in range(ROUNDS)
    ]
    whole, cast = (statistics.median(times) for times in zip(*pairs))
    ratios = sorted(after / before for before, after in pairs)
    row = {
      'crop': 'x'.join(map(str, shape[:2])),
      'uint8_ms': round(whole, 3),
      'float32_ms': round(cast, 3),
      'ratio': round(statistics.median(ratios), 2),
      'least': round(ratios[0], 2),
      'most': round(ratios[-1], 2),
    }
    rows.append(row)
    print(*(f'{name} {value}' for name, value in row.items()), sep='  ')
  path = pathlib.Path(__file__).with_name('resize.csv')
  with path.open('w', newline='') as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)


if __name__ == '__main__':
  main()
