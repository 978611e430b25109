"""What the doors share that run a trained network on images."""

from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
import tqdm

from nfnet_jax import errors
from nfnet_jax.models import inputs
from nfnet_jax.weights import load


class Network:
  """A trained network that maps images in pixel units to its outputs."""

  def __init__(self, weights: load.Weights, batch_size: int):
    """Puts the weights on the default device.

    Args:
      weights: the network.
      batch_size: of the one program that is compiled.
    """
    endpoints = weights.create().endpoints
    self._batch_size = batch_size
    self._weights = jax.device_put((weights.params, weights.model_state))

    @jax.jit
    def run(params, state, images):
      outputs = endpoints(
        params, state, None, inputs.normalize_images(images), False
      )[0]
      return {
        'features': outputs['features'],
        'probabilities': jax.nn.softmax(outputs['logits']),
      }

    self._run = run

  def __call__(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Runs up to `batch_size` images `[S, S, 3]`.

    Returns:
      `features [n, channels]`, pooled, and `probabilities [n, num_classes]`.

    Raises:
      errors.InputError: if there are NaNs among them.
    """
    padded = np.zeros((self._batch_size, *images[0].shape), images[0].dtype)
    padded[: len(images)] = images
    outputs = jax.device_get(self._run(*self._weights, padded))
    if np.isnan(outputs['probabilities'][: len(images)]).any():
      raise errors.InputError(
        'The network gives NaN: its weights are damaged, or its training '
        'diverged.'
      )
    return {name: value[: len(images)] for name, value in outputs.items()}


def in_batches(
  items: Iterable, size: int, total: int, unit: str = 'images'
) -> Iterator[list]:
  """Groups items by `size`, the last fewer, and shows progress in items."""
  with tqdm.tqdm(total=total, unit=f' {unit}', disable=None) as progress:
    group = []
    for item in items:
      group.append(item)
      if len(group) == size:
        yield group
        progress.update(len(group))
        group = []
    if group:
      yield group
      progress.update(len(group))
