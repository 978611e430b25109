"""Flags that several commands share, and the values that they stand for.

A command declares those that it takes with `flags.declare_key_flag`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile

from absl import flags
from etils import epath

from nfnet_jax import errors
from nfnet_jax.config import workdir as workdir_lib
from nfnet_jax.storage import failures, files
from nfnet_jax.weights import load, network

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run, a local one or gs://BUCKET/FOLDER.'
)
JSON = flags.DEFINE_bool('json', False, 'Print one JSON object.')
OUT = flags.DEFINE_string('out', '.', 'Folder to write to.')
DATA_DIR = flags.DEFINE_string(
  'data_dir', None, "Folder of TFDS datasets; by default TFDS's own."
)
TO = flags.DEFINE_string('to', None, 'File to write.')
DATASET = flags.DEFINE_string('dataset', None, 'Dataset to take images from.')
SPLIT = flags.DEFINE_string('split', 'train', 'Split of the dataset.')
WEIGHTS = flags.DEFINE_string(
  'weights',
  None,
  'Trained network: a published file, a file of timm, an .npz or .safetensors '
  'of this project, or the folder of a run. Or one to fetch: nfnet_f0 to '
  'nfnet_f6, https://..., or hf:OWNER/REPO.',
)
TIMM_FORWARD = flags.DEFINE_bool(
  'timm_forward', False, "Compute as timm's dm_nfnet_* do."
)
SIZE = flags.DEFINE_integer(
  'size', None, "Image size in pixels; by default the network's.", lower_bound=1
)


def get_out() -> pathlib.Path:
  """Return the folder of `--out`, which exists and can be written to.

  Raises:
    errors.InputError: if it cannot be made or written to.
  """
  out = pathlib.Path(OUT.value)
  try:
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()
  except OSError as error:
    raise errors.InputError(
      f"--out='{out}': {error.strerror}. Name a folder that exists or can be "
      'made.'
    ) from error
  return out


def get_to() -> str:
  """Return the file of `--to`.

  Raises:
    errors.InputError: if none was given, or its folder does not exist.
  """
  if not TO.value:
    raise errors.InputError('Name the file to write: --to=FILE.')
  folder = pathlib.Path(TO.value).parent
  if not files.is_in_bucket(TO.value) and not folder.is_dir():
    raise errors.InputError(f"--to='{TO.value}': there is no such folder.")
  return TO.value


def get_weights() -> network.Weights:
  """Read the network of `--weights`, with `--size` and `--timm_forward`.

  Raises:
    errors.InputError: if there is none, or it cannot be used.
    errors.RunError: if it cannot be read now.
  """
  if not WEIGHTS.value:
    raise errors.InputError('Name a trained network: --weights=PATH.')
  with failures.as_command_error(ValueError):
    weights = load.load_weights(WEIGHTS.value)
    if TIMM_FORWARD.value:
      weights = weights.with_options(timm_forward=True)
    if SIZE.value is None:
      return weights
    resized = dataclasses.replace(weights.preprocessing, size=SIZE.value)
    return dataclasses.replace(weights, preprocessing=resized)


def get_workdir() -> epath.Path:
  """Return the absolute path of `--workdir`.

  Raises:
    errors.InputError: if none was given, or it cannot hold a run.
  """
  if not _WORKDIR.value:
    raise errors.InputError('Name the folder of the run: --workdir=DIR.')
  return workdir_lib.parse_path(_WORKDIR.value)
