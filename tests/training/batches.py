"""Random training batches."""

import numpy as np


def random_batch(step, *, count, size, classes, seed=None):
  """Return the batch of a step; `seed` is the step unless it is given."""
  rng = np.random.default_rng(step if seed is None else seed)
  return {
    'image': rng.uniform(0, 255, (count, size, size, 3)).astype(np.float32),
    'label': rng.integers(0, classes, (count, 1)).astype(np.int32),
    'weight': np.ones((count, 1), np.float32),
    'position': np.arange(count, dtype=np.int32),
    'step': np.int32(step),
  }
