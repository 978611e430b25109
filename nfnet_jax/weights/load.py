"""Trained networks from files of any known kind."""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import inspect
import io
import json
import os
from typing import Any

from absl import logging
from etils import epath
import numpy as np

from nfnet_jax import errors, preprocessing
from nfnet_jax.models import registry
from nfnet_jax.storage import failures, files
from nfnet_jax.weights import arrays as arrays_lib
from nfnet_jax.weights import classes, identify, pickles, timm

Tree = Mapping[str, Mapping[str, np.ndarray]]

# Of the published files, by model, as recorded by a third party.
PUBLISHED_MD5 = {
  'nfnet_f0': '0a41039da1cb43adf47f1b7d86ddfe0f',
  'nfnet_f1': 'c9126bbfaf855f9ddb7ff3b902558781',
  'nfnet_f2': '7a018d8d1498020e2f5a8719a1e7f53f',
  'nfnet_f3': 'd8e1e78d26db659c486150dbaccbe78a',
  'nfnet_f4': 'f5974a7e3388aa81b91a9f1403e759a4',
  'nfnet_f5': '8639e925de951030651ac775b9f915c3',
  'nfnet_f6': 'b16cca40ac1ecec2bd5e3273866da0c1',
}


# First words of the names in a flat file.
PARAMS, STATE = 'params', 'state'
_EVALUATION = tuple(
  field.name for field in dataclasses.fields(preprocessing.EvalPreprocessing)
)
# What a note may say, if it says anything.
_METADATA_CHECKS = {
  'model': lambda value: isinstance(value, str),
  'options': lambda value: isinstance(value, dict),
  'class_names': lambda value: (
    isinstance(value, list) and all(isinstance(name, str) for name in value)
  ),
}

# Of a run's model: what the network is, not how it was trained.
_OPTIONS = ('activation', 'se_ratio', 'timm_forward')


class WeightsError(ValueError):
  """Weights cannot be used; the message names the file and says why."""


@dataclasses.dataclass(frozen=True)
class Weights:
  """A trained network, and how images are prepared for it.

  Attributes:
    params: float32 `{module path: {name: array}}`, under the published paths.
    model_state: running statistics likewise; empty for normalizer-free models.
    model: registry name.
    num_classes: size of the logits.
    options: of the model's module, where they are not its own defaults.
    class_names: what the logits stand for.
    preprocessing: what evaluation does to an image.
  """

  params: Tree
  model_state: Tree
  model: str
  num_classes: int
  options: Mapping[str, Any]
  class_names: Sequence[str]
  preprocessing: preprocessing.EvalPreprocessing

  def create(self) -> registry.Model:
    """Builds the model that the weights are of."""
    return registry.create(self.model, self.num_classes, **self.options)

  def with_options(self, **options: Any) -> 'Weights':
    """Returns the same weights for a model of other options.

    Raises:
      WeightsError: if the model's family has no such option.
    """
    family = registry.get_model_spec(self.model).family
    known = inspect.signature(family.__init__).parameters
    for name in options:
      if name not in known:
        raise WeightsError(f"'{self.model}' has no option {name}.")
    return dataclasses.replace(self, options={**self.options, **options})

  def metadata(self) -> dict[str, Any]:
    """Returns everything but the arrays, as a file of weights holds it."""
    return {
      'model': self.model,
      'num_classes': self.num_classes,
      'options': dict(self.options),
      'class_names': list(self.class_names),
      **dataclasses.asdict(self.preprocessing),
    }


def load_weights(path: str | os.PathLike) -> Weights:
  """Reads a trained network; what kind of file it is shows in its contents.

  Known are the published files (pickles, whatever their ending), safetensors of
  timm's `dm_nfnet_*`, `.npz` and safetensors of this project, and the folder of
  a run or of one of its checkpoints, of which the averaged weights are taken.
  Nothing is unpickled but plain arrays.

  Args:
    path: local, or in a bucket.

  Raises:
    WeightsError: in one line, what is wrong with which file.

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
  path = epath.Path(path)
  try:
    return _from_run(path) if _is_folder(path) else _from_file(path)
  except FileNotFoundError as error:
    raise WeightsError(f"There are no weights '{path}'.") from error
  except (OSError, ValueError) as error:
    reason = errors.one_line(error).removesuffix('.')
    raise WeightsError(f"Weights '{path}' cannot be used: {reason}.") from error


def _is_folder(path: epath.Path) -> bool:
  with failures.as_os_error('looking for them'):
    return path.is_dir()


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
  """Reads a published file: `{module path: {name: array}}`."""
  params = pickles.read_pickle(data)
  if not _is_tree(params):
    raise WeightsError('the pickle is no mapping of mappings of arrays')
  weights = _describe(params, {}, {})
  expected = PUBLISHED_MD5.get(weights.model)
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
  """Makes sense of flat names: timm's, or the paths of this project."""
  if timm.is_timm(arrays):
    return _describe(timm.from_timm(arrays), {}, metadata)
  trees = {PARAMS: {}, STATE: {}}
  for name, array in arrays.items():
    module, _, leaf = name.rpartition('/')
    kind, _, path = module.partition('/')
    tree = trees[kind if kind in trees else PARAMS]
    tree.setdefault(path if kind in trees else module, {})[leaf] = array
  return _describe(trees[PARAMS], trees[STATE], metadata)


def _from_run(path: epath.Path) -> Weights:
  """Reads the averaged weights of a run, or of one of its checkpoints."""
  from nfnet_jax.training import checkpoint  # Orbax is slow to import.

  if not files.is_in_bucket(path):  # epath would look for it in this folder.
    path = path.resolve()
  step = int(path.name) if path.parent.name == 'checkpoints' else None
  inside = path if step is None else path.parent
  workdir = inside.parent if inside.name == 'checkpoints' else inside
  if not (
    _is_folder(workdir / 'checkpoints') and (workdir / 'config.json').exists()
  ):
    raise WeightsError('the folder holds no run with a checkpoint')
  fields = ('ema_params', 'ema_model_state')
  with checkpoint.Checkpoints(
    workdir / 'checkpoints', read_only=True
  ) as checkpoints:
    state = checkpoints.restore_fields(fields, step)
  names = workdir / 'classes.txt'
  metadata = {
    **_metadata_of_config(workdir / 'config.json'),
    'class_names': names.read_text().splitlines() if names.exists() else None,
  }
  return _describe(*(state[field] for field in fields), metadata)


def _metadata_of_config(path: epath.Path) -> dict[str, Any]:
  """Takes from a run's configuration what a note says."""
  try:
    config = json.loads(path.read_text())
    model = config['model']
    return {
      'model': model['name'],
      'options': {k: model[k] for k in _OPTIONS if model[k] is not None},
      **{key: config['data'][f'eval_{key}'] for key in _EVALUATION},
    }
  except Exception as error:  # As many kinds as there are mistakes.
    raise WeightsError(f"'{path}' is damaged: {error!r}") from error


def _describe(
  params: Tree, model_state: Tree, metadata: Mapping[str, Any]
) -> Weights:
  """Checks trees against the model that they are of, and adds its defaults."""
  _check_metadata(metadata)
  trees = (params, model_state)
  name, options = metadata.get('model'), metadata.get('options') or {}
  if name is None:
    options = {}
    name, num_classes = identify.identify(*trees)
  else:
    num_classes = identify.count_classes(params)
    identify.check(name, num_classes, options, trees)
  spec = registry.get_model_spec(name)
  class_names = classes.in_words(metadata.get('class_names'), num_classes)
  if len(class_names) != num_classes:
    raise WeightsError(
      f'they have {num_classes} classes and {len(class_names)} names for them'
    )
  return Weights(
    params=_convert(params, np.float32),
    model_state=_convert(model_state),
    model=name,
    num_classes=num_classes,
    options=options,
    class_names=class_names,
    preprocessing=_preprocessing(metadata, spec),
  )


def _preprocessing(
  metadata: Mapping[str, Any], spec: registry.ModelSpec
) -> preprocessing.EvalPreprocessing:
  """Return what the metadata say, and the published values where they do not."""
  given = {
    name: metadata[name]
    for name in _EVALUATION
    if metadata.get(name) is not None
  }
  try:
    return dataclasses.replace(spec.preprocessing, **given)
  except ValueError as error:
    raise WeightsError(f'their metadata are wrong: {error}') from error


def _check_metadata(metadata: Mapping[str, Any]) -> None:
  for key, is_good in _METADATA_CHECKS.items():
    value = metadata.get(key)
    if value is not None and not is_good(value):
      raise WeightsError(f'their note has {value!r} as {key}')


def _convert(tree: Tree, dtype: type | None = None) -> Tree:
  """Gives arrays a dtype, or their own in the byte order of the machine."""
  return {
    path: {
      name: np.asarray(a, dtype or a.dtype.newbyteorder('='))
      for name, a in leaves.items()
    }
    for path, leaves in tree.items()
  }
