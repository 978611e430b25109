"""AutoAugment on uint8 images: 25 sub-policies of two operations.

Source: Cubuk et al., arXiv 1805.09501, the policy for ImageNet in the variant
"v0" that the released pipeline offers, with that pipeline's operations.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import NamedTuple

import tensorflow as tf

from nfnet_jax.data import augment

# Pixels that a unit of magnitude translates by.
_TRANSLATION = 25


class Step(NamedTuple):
  """An operation, the probability that it is applied, and its magnitude."""

  name: str
  probability: float
  magnitude: int


# Draws index this tuple, so its order matters.
POLICIES = tuple(
  (Step(*first), Step(*second))
  for first, second in (
    (('Equalize', 0.8, 1), ('ShearY', 0.8, 4)),
    (('Color', 0.4, 9), ('Equalize', 0.6, 3)),
    (('Color', 0.4, 1), ('Rotate', 0.6, 8)),
    (('Solarize', 0.8, 3), ('Equalize', 0.4, 7)),
    (('Solarize', 0.4, 2), ('Solarize', 0.6, 2)),
    (('Color', 0.2, 0), ('Equalize', 0.8, 8)),
    (('Equalize', 0.4, 8), ('SolarizeAdd', 0.8, 3)),
    (('ShearX', 0.2, 9), ('Rotate', 0.6, 8)),
    (('Color', 0.6, 1), ('Equalize', 1.0, 2)),
    (('Invert', 0.4, 9), ('Rotate', 0.6, 0)),
    (('Equalize', 1.0, 9), ('ShearY', 0.6, 3)),
    (('Color', 0.4, 7), ('Equalize', 0.6, 0)),
    (('Posterize', 0.4, 6), ('AutoContrast', 0.4, 7)),
    (('Solarize', 0.6, 8), ('Color', 0.6, 9)),
    (('Solarize', 0.2, 4), ('Rotate', 0.8, 9)),
    (('Rotate', 1.0, 7), ('TranslateY', 0.8, 9)),
    (('ShearX', 0.0, 0), ('Solarize', 0.8, 4)),
    (('ShearY', 0.8, 0), ('Color', 0.6, 4)),
    (('Color', 1.0, 0), ('Rotate', 0.6, 2)),
    (('Equalize', 0.8, 4), ('Equalize', 0.0, 8)),
    (('Equalize', 1.0, 4), ('AutoContrast', 0.6, 2)),
    (('ShearY', 0.4, 7), ('SolarizeAdd', 0.6, 7)),
    (('Posterize', 0.8, 2), ('Solarize', 0.6, 10)),
    (('Solarize', 0.6, 8), ('Equalize', 0.6, 1)),
    (('Color', 0.8, 6), ('Rotate', 0.4, 5)),
  )
)


class AutoAugment:
  """A random sub-policy on a uint8 image `[size, size, 3]`.

  Args:
    size: height and width in pixels.

  Examples:
    >>> auto_augment = AutoAugment(size=32)
    >>> image = tf.zeros((32, 32, 3), tf.uint8)
    >>> auto_augment(image, seed=tf.constant([0, 1])).shape
    TensorShape([32, 32, 3])
  """

  def __init__(self, size: int):
    magnitudes = {step.magnitude for policy in POLICIES for step in policy}
    self._operations = {
      magnitude: augment.Operations(size, magnitude, _TRANSLATION)
      for magnitude in magnitudes
    }
    self._branches = [
      augment.as_branch(functools.partial(self.apply, policy))
      for policy in POLICIES
    ]

  def __call__(self, image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Augment an image; the result is a function of `seed` (two integers)."""
    draws = tf.random.stateless_uniform([9], seed)
    steps = tf.reshape(draws[1:], [2, 4])
    return augment.apply_one(self._branches, draws[0], image, steps)

  def apply(
    self, policy: Sequence[Step], image: tf.Tensor, draws: tf.Tensor
  ) -> tf.Tensor:
    """Apply the steps of a sub-policy, each with its probability.

    Args:
      policy: steps in their order.
      image: uint8 `[size, size, 3]`.
      draws: `[steps, 4]`, numbers in [0, 1): whether the step is applied, then
        as for `augment.Operations.apply`.
    """
    for step, draw in zip(policy, tf.unstack(draws)):
      operation = self._operations[step.magnitude].apply
      image = tf.cond(
        draw[0] < step.probability,
        functools.partial(operation, step.name, image, draw[1:]),
        functools.partial(tf.identity, image),
      )
    return image
