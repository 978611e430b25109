"""Write weights to files that other programs read."""

from __future__ import annotations

import os

from etils import epath
import numpy as np

from nfnet_jax import trees as trees_lib
from nfnet_jax.models import registry
from nfnet_jax.storage import files
from nfnet_jax.weights import arrays as arrays_lib
from nfnet_jax.weights import load, network, timm

_WRITERS = {
  '.npz': arrays_lib.write_npz,
  '.safetensors': arrays_lib.write_safetensors,
}
LAYOUTS = ('haiku', 'timm')


def save_weights(
  path: str | os.PathLike, weights: network.Weights, layout: str = 'haiku'
) -> None:
  """Write weights to `.npz` (flat, no pickle) or `.safetensors`, atomically.

  Args:
    path: local, or in a bucket; its ending chooses the format.
    weights: all fields of it are written.
    layout: 'haiku' for the published names and layouts, under `params/` and
      `state/`; 'timm' for those of `timm.create_model('dm_nfnet_f0')`, which
      exist for NFNets and light NFNets only.

  Raises:
    ValueError: if the ending or the layout is unknown, or timm does not have
      the model.
    OSError: if the file cannot be written.
  """
  target = epath.Path(path)
  if target.suffix not in _WRITERS:
    raise ValueError(
      f"'{target}' must end in {' or '.join(_WRITERS)} to choose the format."
    )
  arrays = _arrays(weights, layout)
  with files.atomically(target) as temporary:
    _WRITERS[target.suffix](temporary, arrays, weights.metadata())


def _arrays(weights: network.Weights, layout: str) -> dict[str, np.ndarray]:
  if layout == 'timm':
    spec = registry.get_model_spec(weights.model)
    if spec.family not in timm.FAMILIES:
      raise ValueError(
        f"timm's layout is that of NFNets; '{weights.model}' has none."
      )
    depth = spec.family.variants[spec.variant].depth
    return timm.to_timm(weights.params, depth)
  if layout != 'haiku':
    raise ValueError(f"Unknown layout '{layout}'; known: {', '.join(LAYOUTS)}.")
  trees = {load.PARAMS: weights.params, load.STATE: weights.model_state}
  return {
    path: np.asarray(leaf) for path, leaf in trees_lib.named_leaves(trees)
  }
