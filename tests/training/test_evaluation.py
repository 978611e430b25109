"""Sums of an evaluation, and how far it runs ahead of the devices."""

import types

import jax.numpy as jnp
import numpy as np
import optax

from nfnet_jax.training import evaluation


def sums_of(logits, labels, mask=None):
  mask = np.ones(len(labels)) if mask is None else mask
  sums = evaluation.classification_sums(
    jnp.asarray(logits, jnp.float32), jnp.asarray(labels), jnp.asarray(mask)
  )
  return {name: float(value) for name, value in sums.items()}


def test_classification_sums():
  logits = np.eye(8)[[0, 1, 2]] * 3
  sums = sums_of(logits, [0, 7, 2], mask=[1, 1, 0])
  assert sums['count'] == 2
  assert sums['top1'] == 1
  # 7 ties with the other zeros: behind class 1 come 0, 2, 3, 4.
  assert sums['top5'] == 1
  losses = optax.softmax_cross_entropy_with_integer_labels(
    jnp.asarray(logits[:2]), jnp.array([0, 7])
  )
  np.testing.assert_allclose(sums['loss'], float(losses.sum()), rtol=1e-6)


def test_constant_logits_score_at_chance():
  assert sums_of(np.zeros((10, 10)), np.arange(10))['top1'] == 1


def test_nan_logits_are_misses():
  sums = sums_of(np.full((2, 10), np.nan), [0, 0])
  assert sums['top1'] == sums['top5'] == 0


def test_fewer_classes_than_five():
  assert sums_of([[1.0, 0.0, 2.0]], [1])['top5'] == 1


def test_batches_ahead_of_the_devices_are_bounded():
  waited_for = []

  class Sum:
    """A result of a device; notes the batch that was waited for."""

    def __init__(self, batch):
      self.batch = batch

    def block_until_ready(self):
      waited_for.append(self.batch)
      return self

    def __array__(self, dtype=None, copy=None):
      return np.ones((), dtype)

  def batches(number):
    for batch in range(number):
      # Two batches may be on the devices when the next one is asked for.
      finished = max(waited_for, default=-1) + 1
      assert batch - finished <= 2
      yield batch

  def eval_step(params, model_state, batch):
    del params, model_state
    return {name: Sum(batch) for name in ('loss', 'top1', 'top5', 'count')}

  results = evaluation.evaluate(
    eval_step,
    types.SimpleNamespace(shard_batch=lambda batch: batch),
    {'eval': ({}, {}), 'ema': ({}, {})},
    batches(9),
  )
  assert max(waited_for) < 7  # It doesn't wait for every batch.
  assert results['ema/examples'] == 9
