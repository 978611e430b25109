"""Run a trained network on images, in batches of one size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np
import tqdm

from nfnet_jax import errors
from nfnet_jax.models import inputs
from nfnet_jax.weights import load

T = TypeVar('T')


class Predictor:
  """A trained network that maps pixels to features and probabilities."""

  def __init__(self, weights: load.Weights, batch_size: int):
    """Put the weights on the default device.

    Args:
      weights: the network.
      batch_size: images per call of the one program that is compiled.
    """
    endpoints = weights.create().endpoints
    self._batch_size = batch_size
    self._variables = jax.device_put((weights.params, weights.model_state))

    @jax.jit
    def run(params, state, images):
      images = inputs.normalize_images(images)
      outputs, _ = endpoints(params, state, None, images, False)
      return {
        'features': outputs['features'],
        'probabilities': jax.nn.softmax(outputs['logits']),
      }

    self._run = run

  def __call__(
    self, images: Sequence[np.ndarray] | np.ndarray
  ) -> dict[str, np.ndarray]:
    """Run the network on up to `batch_size` images.

    Args:
      images: each `[S, S, 3]`, pixels in 0..255; at least one.

    Returns:
      `features [n, channels]`, pooled, and `probabilities [n, num_classes]`.

    Raises:
      errors.InputError: if the network gives NaN.
    """
    padded = np.zeros((self._batch_size, *images[0].shape), images[0].dtype)
    padded[: len(images)] = images
    outputs = jax.device_get(self._run(*self._variables, padded))
    outputs = {name: value[: len(images)] for name, value in outputs.items()}
    if np.isnan(outputs['probabilities']).any():
      raise errors.InputError(
        'The network gives NaN: its weights are damaged, or its training '
        'diverged.'
      )
    return outputs


def batched_with_progress(
  items: Iterable[T], size: int, total: int, unit: str = 'images'
) -> Iterator[list[T]]:
  """Group items into lists of `size`, and show a progress bar on a terminal.

  Args:
    items: the items to group.
    size: items per list; the last list may have fewer.
    total: number of items.
    unit: name of the items in the bar.
  """
  with tqdm.tqdm(total=total, unit=f' {unit}', disable=None) as progress:
    group: list[T] = []
    for item in items:
      group.append(item)
      if len(group) == size:
        yield group
        progress.update(len(group))
        group = []
    if group:
      yield group
      progress.update(len(group))
