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


def load_weights(path: str | os.PathLike) -> Weights:
  """Load a trained network from a file or folder; its kind is detected.

  Known are the published files (pickles, with any ending), safetensors of
  timm's `dm_nfnet_*`, `.npz` and safetensors of this project, and the folder of
  a run or of one of its checkpoints, of which the EMA weights are taken.
  Pickles are read without running code: they can only yield plain arrays.

  Args:
    path: local, or in a bucket. Or what is fetched once into a cache: the name
      of a model whose weights are published, such as 'nfnet_f0' or 'F0', an
      address, https://..., or hf:OWNER/REPO on the Hugging Face hub.

  Raises:
    WeightsError: if they cannot be used; the message names the path and the
      reason in one line.

  Example:
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> np.savez(f'{folder}/mine.npz', w=np.ones(2))
    >>> try:
    ...   load_weights(f'{folder}/mine.npz')
    ... except WeightsError as error:
    ...   print(str(error).replace(folder, 'DIR')[:56])
    Weights 'DIR/mine.npz' cannot be used: they fit no known
  """
  try:
    path = download.locate(path)
    if runs.is_folder(path):
      return _describe(*runs.read_run(path))
    return _from_file(path)
  except FileNotFoundError as error:
    raise WeightsError(f"There are no weights '{path}'.") from error
  except (OSError, ValueError) as error:
    reason = errors.one_line(error).removesuffix('.')
    raise WeightsError(f"Weights '{path}' cannot be used: {reason}.") from error


def _from_file(path: epath.Path) -> Weights:
  with failures.as_os_error('reading them'):
    data = path.read_bytes()
  if data.startswith(b'PK'):
    return _from_arrays(*arrays_lib.read_npz(io.BytesIO(data)))
  if data.startswith(b'\x80'):
    return _from_pickle(data)
  if data[8:9] == b'{':
    return _from_arrays(*arrays_lib.read_safetensors(data))
  raise WeightsError(
    'they begin neither like a pickle nor like .npz or safetensors'
  )


def _from_pickle(data: bytes) -> Weights:
  """Read a published file: `{module path: {name: array}}`."""
  params = pickles.read_pickle(data)
  if not _is_tree(params):
    raise WeightsError('the pickle is no mapping of mappings of arrays')
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
) -> Weights:
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
) -> Weights:
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
    raise WeightsError(
      f'they have {num_classes} classes and {len(class_names)} names for them'
    )
  defaults = identify.constructor_defaults(name)
  return Weights(
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
    raise WeightsError(f'their metadata are wrong: {error}') from error


def _check_metadata(metadata: Mapping[str, Any]) -> None:
  for key, is_valid in _METADATA_CHECKS.items():
    value = metadata.get(key)
    if value is not None and not is_valid(value):
      raise WeightsError(f'their metadata have {value!r} as {key}')


def _convert(tree: Tree, dtype: type | None = None) -> Tree:
  """Convert arrays to a dtype, or to the byte order of this machine."""
  return {
    path: {
      name: np.asarray(a, dtype or a.dtype.newbyteorder('='))
      for name, a in leaves.items()
    }
    for path, leaves in tree.items()
  }
