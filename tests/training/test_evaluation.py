"""Sums of an evaluation."""

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
