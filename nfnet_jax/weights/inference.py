"""Run a trained network on images, in batches of one size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TYPE_CHECKING, TypeVar

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from nfnet_jax import errors
from nfnet_jax.models import inputs, layers, registry
from nfnet_jax.models.fast import convolutions

if TYPE_CHECKING:
  from nfnet_jax.weights import network

T = TypeVar('T')


class Prediction(NamedTuple):
  """A class that an image may show.

  Attributes:
    label: index of the class.
    name: name of the class.
    probability: from 0 to 1.
  """

  label: int
  name: str
  probability: float


def likeliest(
  probabilities: np.ndarray, names: Sequence[str], count: int
) -> list[Prediction]:
  """Return the likeliest classes of an image, the likeliest first.

  Args:
    probabilities: `[num_classes]`.
    names: names of the classes.
    count: number of classes to return, at most.

  Examples:
    >>> likeliest(np.array([0.25, 0.75]), ['cat', 'dog'], 1)
    [Prediction(label=1, name='dog', probability=0.75)]
  """
  order = (-probabilities).argsort(stable=True)[:count].tolist()
  return [
    Prediction(label, names[label], float(probabilities[label]))
    for label in order
  ]


class Predictor:
  """A trained network that maps pixels to features and probabilities.

  Its kernels are standardised, and those of groups copied, once and not for
  each batch.
  """

  def __init__(self, weights: network.Weights):
    """Put the weights on the default device."""
    spec = registry.get_model_spec(weights.model)
    is_fast = jax.default_backend() == 'cpu' and 'fast_convs' in spec.fast_paths
    if is_fast:
      weights = weights.with_options(fast_convs=True)
    endpoints = weights.create().endpoints
    size = weights.preprocessing.size
    params, state = jax.device_put((weights.params, weights.model_state))
    convs = _standardizing_convs(endpoints, params, state, size)
    self._variables = _prepare(convs, params, split=is_fast), state

    @jax.jit
    def run(params, state, images):
      def use_prepared(call, args, kwargs, context):
        if not _gives_kernel(context):
          return call(*args, **kwargs)
        leaves = params[context.module.module_name]
        return leaves['kernel'], leaves['bias']

      images = inputs.normalize_images(images)
      with hk.intercept_methods(use_prepared):
        outputs, _ = endpoints(params, state, None, images, False)
      return {
        'features': outputs['features'],
        'probabilities': jax.nn.softmax(outputs['logits']),
      }

    self._run = run

  def __call__(
    self, images: Sequence[np.ndarray] | np.ndarray, batch_size: int
  ) -> dict[str, np.ndarray]:
    """Run the network on up to `batch_size` images.

    Args:
      images: each `[S, S, 3]`, pixels in 0..255; at least one.
      batch_size: images that the program takes, which is compiled once for
        each batch size.

    Returns:
      `features [n, channels]`, pooled, and `probabilities [n, num_classes]`.

    Raises:
      errors.InputError: if the network gives NaN.
    """
    padded = np.zeros((batch_size, *images[0].shape), images[0].dtype)
    padded[: len(images)] = images
    outputs = jax.device_get(self._run(*self._variables, padded))
    outputs = {name: value[: len(images)] for name, value in outputs.items()}
    if np.isnan(outputs['probabilities']).any():
      raise errors.InputError(
        'The network gives NaN: its weights are damaged, or its training '
        'diverged.'
      )
    return outputs


def _standardizing_convs(
  endpoints: Callable[..., Any], params: Any, state: Any, size: int
) -> dict[str, layers.ScaledWSConv2D]:
  """Return the convolutions that standardise their kernels, by their paths."""
  if not any('gain' in leaves for leaves in params.values()):
    return {}
  modules: dict[str, layers.ScaledWSConv2D] = {}

  def record(call, args, kwargs, context):
    if _gives_kernel(context):
      modules[context.module.module_name] = context.module
    return call(*args, **kwargs)

  def trace(params, state):
    image = jnp.zeros((1, size, size, 3))
    with hk.intercept_methods(record):
      return endpoints(params, state, None, image, False)

  jax.eval_shape(trace, params, state)
  return modules


def _gives_kernel(context: hk.MethodContext) -> bool:
  """Return whether the method called is one that standardises a kernel."""
  is_conv = isinstance(context.module, layers.ScaledWSConv2D)
  return is_conv and context.method_name == 'parameters'


def _prepare(
  convs: dict[str, layers.ScaledWSConv2D], params: Any, split: bool
) -> dict[str, Any]:
  """Return the parameters with standardised kernels in place of `w` and `gain`.

  Args:
    convs: see `_standardizing_convs`.
    params: parameters of all modules.
    split: whether to split the kernels of groups.
  """

  @jax.jit
  def prepare(params):
    prepared = {}
    for path, leaves in params.items():
      conv = convs[path]
      kernel = conv.standardize(leaves['w'], leaves['gain'])
      groups = conv.groups if split else 1
      prepared[path] = {
        'kernel': convolutions.split_kernel(kernel, groups),
        'bias': leaves['bias'],
      }
    return prepared

  return {**params, **prepare({path: params[path] for path in convs})}


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
