"""A trained network: its weights, and everything needed to use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent import futures
import dataclasses
import functools
import os
from typing import Any

import numpy as np
import PIL.Image

from nfnet_jax import images as images_lib
from nfnet_jax import preprocessing as preprocessing_lib
from nfnet_jax.models import registry
from nfnet_jax.weights import identify, inference

Tree = Mapping[str, Mapping[str, np.ndarray]]
Image = str | os.PathLike | np.ndarray | PIL.Image.Image

# Images that `predict` computes at a time.
_MAX_BATCH = 32


class WeightsError(ValueError):
  """Weights cannot be used; the message names the file and the reason."""


@dataclasses.dataclass(frozen=True)
class Weights:
  """A trained network, and how images are prepared for it.

  Attributes:
    params: float32 `{module path: {name: array}}`, under the published paths.
    model_state: running statistics likewise; empty for normalizer-free models.
    model: registry name.
    num_classes: size of the logits.
    options: arguments of the model's constructor that are not its defaults.
    class_names: names of the classes, in the order of the logits.
    preprocessing: preprocessing of images for evaluation.
  """

  params: Tree
  model_state: Tree
  model: str
  num_classes: int
  options: Mapping[str, Any]
  class_names: Sequence[str]
  preprocessing: preprocessing_lib.EvalPreprocessing

  def create(self) -> registry.Model:
    """Build the model that the weights belong to."""
    return registry.create_model(self.model, self.num_classes, **self.options)

  def with_options(self, **options: Any) -> Weights:
    """Return the same weights for a model with other options.

    Raises:
      WeightsError: if the model has no such option.
    """
    known = identify.constructor_defaults(self.model)
    for name in options:
      if name not in known:
        raise WeightsError(f"'{self.model}' has no option {name}.")
    return dataclasses.replace(self, options={**self.options, **options})

  def metadata(self) -> dict[str, Any]:
    """Return everything but the arrays, as files of weights store it."""
    return {
      'model': self.model,
      'num_classes': self.num_classes,
      'options': dict(self.options),
      'class_names': list(self.class_names),
      **dataclasses.asdict(self.preprocessing),
    }

  def preprocess(self, image: Image) -> np.ndarray:
    """Read, crop and resize an image as in evaluation of this network.

    Args:
      image: a file, local or in a bucket; a Pillow image; or an array
        `[H, W, 3]` of pixels 0 to 255.

    Returns:
      float32 `[size, size, 3]`, pixels 0 to 255, which `normalize_images` turns
      into the model's input.

    Raises:
      images.ImageError: if it cannot be read, or is no such array.
    """
    return images_lib.preprocess(image, self.preprocessing)

  def predict(
    self, images: Image | Sequence[Image], top: int = 5
  ) -> list[list[inference.Prediction]]:
    """Return what images show, as the command `predict` does.

    The network is compiled at the first call, and again for other numbers of
    images up to 32, rounded up to a power of two.

    Args:
      images: as for `preprocess`; several, or a single one.
      top: number of classes to return for each image, at most.

    Returns:
      A list for each image, of (label, name, probability), the likeliest first.

    Raises:
      images.ImageError: if one cannot be read, or is no such array.
      errors.InputError: if the network gives NaN.

    Examples:
      >>> import nfnet_jax
      >>> weights = nfnet_jax.load_weights('F0')  # doctest: +SKIP
      >>> for label, name, probability in weights.predict('cat.jpg')[0]:
      ...   print(f'{probability:.1%} {name}')  # doctest: +SKIP
    """
    several = _listed(images)
    size = min(_MAX_BATCH, 1 << (len(several) - 1).bit_length())
    predictions = []
    with futures.ThreadPoolExecutor() as pool:
      for start in range(0, len(several), size):
        batch = several[start : start + size]
        pixels = list(pool.map(self.preprocess, batch))
        outputs = self._predictor(pixels, size)['probabilities']
        predictions += [
          inference.likeliest(row, self.class_names, top) for row in outputs
        ]
    return predictions

  @functools.cached_property
  def _predictor(self) -> inference.Predictor:
    return inference.Predictor(self)


def _listed(images: Image | Sequence[Image]) -> list[Image]:
  if isinstance(images, np.ndarray):
    return list(images) if images.ndim == 4 else [images]
  if isinstance(images, (str, os.PathLike, PIL.Image.Image)):
    return [images]
  return list(images)
