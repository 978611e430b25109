"""The training step to plan: sizes and settings that a plan depends on."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Workload:
  """The properties of a training run that its plan depends on.

  Attributes:
    config: name of the experiment.
    model: name of the model.
    image_size: height and width of training images in pixels.
    dtype: dtype of the forward and backward pass.
    batch: examples per step on all devices.
    steps: training steps in total.
    examples: examples per epoch, or None if unknown.
    decoded: images to decode per training image.
    macs: multiply-adds of the forward pass per image.
    parameter_bytes: size of the parameters.
    state_bytes: size of the whole training state.
    state_bytes_per_device: size of the state on one device, which is smaller if
      the update is sharded.
    microbatches: microbatches per step and device.
    sam_examples: examples per device for the ascent of SAM; 0 without SAM.
    remat: whether the backward pass recomputes the blocks.
    fast_paths: names of the fast paths in use.
    fast_path_titles: title of every fast path by name, in use or not.
  """

  config: str
  model: str
  image_size: int
  dtype: str
  batch: int
  steps: int
  examples: int | None
  decoded: float
  macs: int
  parameter_bytes: int
  state_bytes: int
  state_bytes_per_device: int
  microbatches: int = 1
  sam_examples: int = 0
  remat: bool = False
  fast_paths: tuple[str, ...] = ()
  fast_path_titles: Mapping[str, str] = dataclasses.field(default_factory=dict)


def num_bytes(tree: Any) -> int:
  """Return the size of a tree of arrays or shapes.

  Examples:
    >>> num_bytes({'w': jax.ShapeDtypeStruct((2, 3), 'float32')})
    24
  """
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
