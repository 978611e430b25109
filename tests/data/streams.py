"""Batches of training streams, and whether they are the same."""

import itertools

import numpy as np

from nfnet_jax.data import pipeline


def take(spec, count, *args, **options):
  """Return the first batches of a stream; the rest as `train_batches`."""
  batches = pipeline.train_batches(spec, *args, **options)
  return list(itertools.islice(batches, count))


def assert_same(ours, theirs):
  """Check that batches are equal bit for bit."""
  for a, b in zip(ours, theirs, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)
