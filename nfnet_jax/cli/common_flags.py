"""Flags that several doors share, and what they name.

Each door declares those that it takes, with `flags.declare_key_flag`.
"""

import dataclasses
import pathlib
import re
import tempfile

from absl import flags

from nfnet_jax import errors
from nfnet_jax.storage import files

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run, a local one or gs://BUCKET/FOLDER.'
)
JSON = flags.DEFINE_bool('json', False, 'Prints one JSON object.')
OUT = flags.DEFINE_string('out', '.', 'Folder for tables and pictures.')
DATA_DIR = flags.DEFINE_string(
  'data_dir', None, "Folder of datasets; TFDS's own by default."
)
TO = flags.DEFINE_string('to', None, 'File to write.')
DATASET = flags.DEFINE_string('dataset', None, 'Images of a dataset.')
SPLIT = flags.DEFINE_string('split', 'train', 'Split of the dataset.')
WEIGHTS = flags.DEFINE_string(
  'weights',
  None,
  "Trained network: a published file, timm's or this project's .npz or "
  '.safetensors, or the folder of a run.',
)
TIMM_FORWARD = flags.DEFINE_bool(
  'timm_forward', False, "Computes as timm's dm_nfnet_* do."
)
SIZE = flags.DEFINE_integer(
  'size', None, "Pixels a side; by default the network's own.", lower_bound=1
)


def get_out() -> pathlib.Path:
  """Returns the folder of `--out`, which is made and can be written to.

  Raises:
    errors.InputError: if that cannot be.
  """
  out = pathlib.Path(OUT.value)
  try:
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()
  except OSError as error:
    raise errors.InputError(
      f"--out='{out}': {error.strerror}. Name a folder, or where one can be "
      'made.'
    ) from error
  return out


def get_to() -> str:
  """Returns the file of `--to`.

  Raises:
    errors.InputError: if none was given, or its folder is not there.
  """
  if not TO.value:
    raise errors.InputError('Say where to write: --to=FILE.')
  if (
    not files.is_in_bucket(TO.value)
    and not pathlib.Path(TO.value).parent.is_dir()
  ):
    raise errors.InputError(f"--to='{TO.value}': there is no such folder.")
  return TO.value


def get_weights():
  """Reads the `weights.load.Weights` of `--weights`, as `--size` changes them.

  Raises:
    errors.InputError: if there are none, or they cannot be used.
  """
  from nfnet_jax.weights import load

  if not WEIGHTS.value:
    raise errors.InputError('Name a trained network: --weights=PATH.')
  with errors.as_input_error():
    weights = load.load_weights(WEIGHTS.value)
    if TIMM_FORWARD.value:
      weights = weights.with_options(timm_forward=True)
    if not SIZE.value:
      return weights
    changed = dataclasses.replace(weights.preprocessing, size=SIZE.value)
    return dataclasses.replace(weights, preprocessing=changed)


def get_workdir():
  """Returns the absolute `epath.Path` of `--workdir`.

  Raises:
    errors.InputError: if none was given, or it is no place for a run.
  """
  if not _WORKDIR.value:
    raise errors.InputError('Say where the run lives: --workdir=DIR.')
  return to_workdir(_WORKDIR.value)


def to_workdir(name: str):
  """Returns the absolute `epath.Path` of a local folder or one in a bucket.

  Raises:
    errors.InputError: if it is in something else.
  """
  from etils import epath

  if not files.is_in_bucket(name):
    return epath.Path(pathlib.Path(name).resolve())
  if not re.match('gs://[^/]', name):
    raise errors.InputError(
      f"--workdir='{name}' is neither a local folder nor gs://BUCKET/FOLDER."
    )
  return epath.Path(name)
