"""Load trained networks from files and folders of any known kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import io
import os
from typing import Any

from absl import logging
from etils import epath
import numpy as np

from nfnet_jax import errors
from nfnet_jax import preprocessing as preprocessing_lib
from nfnet_jax.models import registry
from nfnet_jax.storage import failures
from nfnet_jax.weights import arrays as arrays_lib
from nfnet_jax.weights import (
  classes,
  download,
  identify,
  inference,
  network,
  pickles,
  runs,
  timm,
)

Tree = Mapping[str, Mapping[str, np.ndarray]]

# Prefixes of the names in a flat file.
PARAMS, STATE = 'params', 'state'

# Key of the metadata -> predicate on its values.
_METADATA_CHECKS = {
  'model': lambda value: isinstance(value, str),
  'options': lambda value: isinstance(value, dict),
  'class_names': lambda value: (
    isinstance(value, list) and all(isinstance(name, str) for name in value)
  ),
}


def load_weights(path: str | os.PathLike) -> network.Weights:
  """Load a trained network from a file or folder; its kind is detected.

  Known are the published files (pickles, with any ending), safetensors of
  timm's `dm_nfnet_*` and light NFNets, `.npz` and safetensors of this project,
  and the folder of a run or of one of its checkpoints, of which the EMA weights
  are taken. Pickles are read without running code: they can only yield plain
  arrays.

  Args:
    path: local, or in a bucket. Or what is fetched once into a cache: the name
      of a model whose weights are published, such as 'nfnet_f0', 'F0' or
      'eca_nfnet_l0', an address, https://..., or hf:OWNER/REPO on the Hugging
      Face hub.

  Raises:
    network.WeightsError: if they cannot be used; the message names the path and
      the reason in one line.

  Examples:
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> np.savez(f'{folder}/mine.npz', w=np.ones(2))
    >>> try:
    ...   load_weights(f'{folder}/mine.npz')
    ... except ValueError as error:
    ...   print(str(error).replace(folder, 'DIR')[:56])
    Weights 'DIR/mine.npz' cannot be used: they fit no known
  """
  try:
    with errors.naming_extras():
      path = download.locate(path)
      if runs.is_folder(path):
        return _describe(*runs.read_run(path))
      return _from_file(path)
  except FileNotFoundError as error:
    raise network.WeightsError(f"There are no weights '{path}'.") from error
  except (OSError, ValueError) as error:
    reason = errors.one_line(error).removesuffix('.')
    raise network.WeightsError(
      f"Weights '{path}' cannot be used: {reason}."
    ) from error


def predict(
  path: str | os.PathLike,
  images: network.Image | Sequence[network.Image],
  top: int = 5,
) -> list[list[inference.Prediction]]:
  """Load a trained network, and return what images show.

  To ask it again, keep the result of `load_weights` and call its `predict`,
  which does not load and compile the network again.

  Args:
    path: as for `load_weights`.
    images: files, Pillow images or arrays `[H, W, 3]` of pixels 0 to 255;
      several, or a single one.
    top: number of classes to return for each image, at most.

  Returns:
    A list for each image, of (label, name, probability), the likeliest first.

  Raises:
    ValueError: if the weights or an image cannot be used; the message says why
      in one line.
  """
  return load_weights(path).predict(images, top)


def _from_file(path: epath.Path) -> network.Weights:
  data = failures.read('reading them', path.read_bytes)
  if data.startswith(b'PK'):
    return _from_arrays(*arrays_lib.read_npz(io.BytesIO(data)))
  if data.startswith(b'\x80'):
    return _from_pickle(data)
  if data[8:9] == b'{':
    return _from_arrays(*arrays_lib.read_safetensors(data))
  raise network.WeightsError(
    'they begin neither like a pickle nor like .npz or safetensors'
  )


def _from_pickle(data: bytes) -> network.Weights:
  """Read a published file: `{module path: {name: array}}`."""
  params = pickles.read_pickle(data)
  if not _is_tree(params):
    raise network.WeightsError('the pickle is no mapping of mappings of arrays')
  weights = _describe(params, {}, {})
  expected = download.PUBLISHED_MD5.get(weights.model)
  md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
  if expected not in (None, md5) and weights.num_classes == 1000:
    logging.warning(
      'The file has the shapes of the published %s but md5 %s, not %s: it is '
      'damaged, or not the one that the authors published.',
      weights.model,
      md5,
      expected,
    )
  return weights


def _is_tree(value: Any) -> bool:
  return isinstance(value, dict) and all(
    isinstance(path, str)
    and isinstance(leaves, dict)
    and all(isinstance(leaf, np.ndarray) for leaf in leaves.values())
    for path, leaves in value.items()
  )


def _from_arrays(
  arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> network.Weights:
  """Build trees of flat names: timm's, or the paths of this project."""
  if timm.is_timm(arrays):
    return _describe(timm.from_timm(arrays), {}, metadata)
  trees: dict[str, dict[str, dict[str, np.ndarray]]] = {PARAMS: {}, STATE: {}}
  for name, array in arrays.items():
    module, _, leaf = name.rpartition('/')
    kind, _, path = module.partition('/')
    if kind not in trees:  # Without a first part they are parameters.
      kind, path = PARAMS, module
    trees[kind].setdefault(path, {})[leaf] = array
  return _describe(trees[PARAMS], trees[STATE], metadata)


def _describe(
  params: Tree, model_state: Tree, metadata: Mapping[str, Any]
) -> network.Weights:
  """Check trees against their model, and fill in what the metadata lack."""
  _check_metadata(metadata)
  trees = (params, model_state)
  name, options = metadata.get('model'), metadata.get('options') or {}
  if name is None:
    options = {}
    name, num_classes = identify.identify(*trees)
  else:
    num_classes = identify.count_classes(params)
    identify.check(name, num_classes, options, trees)
  class_names = classes.readable_names(metadata.get('class_names'), num_classes)
  if len(class_names) != num_classes:
    raise network.WeightsError(
      f'they have {num_classes} classes and {len(class_names)} names for them'
    )
  defaults = identify.constructor_defaults(name)
  return network.Weights(
    params=_convert(params, np.float32),
    model_state=_convert(model_state),
    model=name,
    num_classes=num_classes,
    options={k: v for k, v in options.items() if v != defaults[k]},
    class_names=class_names,
    preprocessing=_preprocessing(metadata, registry.get_model_spec(name)),
  )


def _preprocessing(
  metadata: Mapping[str, Any], spec: registry.ModelSpec
) -> preprocessing_lib.EvalPreprocessing:
  """Return the preprocessing of the metadata, with published defaults."""
  names = (field.name for field in dataclasses.fields(spec.preprocessing))
  given: dict[str, Any] = {
    name: metadata[name] for name in names if metadata.get(name) is not None
  }
  try:
    return dataclasses.replace(spec.preprocessing, **given)
  except ValueError as error:
    raise network.WeightsError(f'their metadata are wrong: {error}') from error


def _check_metadata(metadata: Mapping[str, Any]) -> None:
  for key, is_valid in _METADATA_CHECKS.items():
    value = metadata.get(key)
    if value is not None and not is_valid(value):
      raise network.WeightsError(f'their metadata have {value!r} as {key}')


def _convert(tree: Tree, dtype: type | None = None) -> Tree:
  """Convert arrays to a dtype, or to the byte order of this machine."""
  return {
    path: {
      name: np.asarray(a, dtype or a.dtype.newbyteorder('='))
      for name, a in leaves.items()
    }
    for path, leaves in tree.items()
  }
