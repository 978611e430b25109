"""Writing weights to files that other programs read."""

import os

from etils import epath
import numpy as np

from nfnet_jax.models import nfnet, registry
from nfnet_jax.storage import files
from nfnet_jax.weights import arrays as arrays_lib
from nfnet_jax.weights import load, timm

_WRITERS = {
  '.npz': arrays_lib.write_npz,
  '.safetensors': arrays_lib.write_safetensors,
}
LAYOUTS = ('haiku', 'timm')


def save_weights(
  path: str | os.PathLike, weights: load.Weights, layout: str = 'haiku'
) -> None:
  """Writes weights to `.npz` (flat, no pickle) or `.safetensors`, atomically.

  Args:
    path: local, or in a bucket; its ending chooses the format.
    weights: see `load.Weights`. Everything in it is kept.
    layout: 'haiku' for the published names and layouts, under `params/` and
      `state/`; 'timm' for those of `timm.create_model('dm_nfnet_f0')`, which
      only NFNets have.

  Raises:
    ValueError: if ending or layout is unknown, or the model has no such layout.
    OSError: if the file cannot be written.
  """
  path = epath.Path(path)
  if path.suffix not in _WRITERS:
    raise ValueError(
      f"'{path}' must end in {' or '.join(_WRITERS)}, which says what to write."
    )
  arrays = _arrays(weights, layout)
  with files.atomically(path) as temporary:
    _WRITERS[path.suffix](temporary, arrays, weights.metadata())


def _arrays(weights: load.Weights, layout: str) -> dict[str, np.ndarray]:
  if layout == 'timm':
    spec = registry.get_model_spec(weights.model)
    if spec.family is not nfnet.NFNet:
      raise ValueError(
        f"timm's layout is that of NFNets; '{weights.model}' has none."
      )
    depth = nfnet.VARIANTS[spec.variant].depth
    return timm.to_timm(weights.params, depth)
  if layout != 'haiku':
    raise ValueError(f"Unknown layout '{layout}'; known: {', '.join(LAYOUTS)}.")
  trees = {load.PARAMS: weights.params, load.STATE: weights.model_state}
  return {path: np.asarray(leaf) for path, leaf in trees.named_leaves(trees)}
