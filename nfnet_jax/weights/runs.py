"""Read the trained network of a run from its folder."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import json
from typing import Any

from etils import epath
import numpy as np

from nfnet_jax import preprocessing
from nfnet_jax.models import classifier
from nfnet_jax.storage import failures, files, run_files

Tree = Mapping[str, Mapping[str, np.ndarray]]

# Keys of `config.model` that do not change what a trained network computes:
# regularisation, and over which devices training takes batch statistics.
_TRAINING_ONLY = (*classifier.REGULARIZATION, 'cross_replica_bn')


class RunFormatError(ValueError):
  """A folder holds no run, or a damaged one."""


def read_run(path: epath.Path) -> tuple[Tree, Tree, dict[str, Any]]:
  """Read the EMA weights of a run, or of one of its checkpoints.

  Args:
    path: a run's folder, its `checkpoints`, or one of those; local or in a
      bucket. Of several checkpoints the newest that can be read is taken.

  Returns:
    Parameters, state, and metadata as in a file of weights. A setting that the
    run's `config.json` does not have is missing from the metadata, too: runs
    that were saved before an option existed have its default.

  Raises:
    RunFormatError: if there is no run, or its `config.json` is damaged.
    OSError: if a file cannot be read.
    ValueError: if no checkpoint can be read.
  """
  from nfnet_jax.training import checkpoint  # Orbax is slow to import.

  if not files.is_in_bucket(path):  # `resolve` is for paths on a disk.
    path = path.resolve()
  is_step = path.parent.name == run_files.CHECKPOINTS and path.name.isdigit()
  step = int(path.name) if is_step else None
  inside = path if step is None else path.parent
  workdir = inside.parent if inside.name == run_files.CHECKPOINTS else inside
  if not (
    is_folder(workdir / run_files.CHECKPOINTS)
    and (workdir / run_files.CONFIG).exists()
  ):
    raise RunFormatError('the folder holds no run with a checkpoint')
  with checkpoint.Checkpoints(
    workdir / run_files.CHECKPOINTS, read_only=True
  ) as checkpoints:
    state = checkpoints.restore_fields(('ema_params', 'ema_model_state'), step)
  metadata = _metadata_of_config(workdir / run_files.CONFIG)
  names = workdir / run_files.CLASSES
  if names.exists():
    metadata['class_names'] = names.read_text().splitlines()
  return state['ema_params'], state['ema_model_state'], metadata


def is_folder(path: epath.Path) -> bool:
  """Return whether a path is a folder, local or in a bucket."""
  return failures.read('looking for them', path.is_dir)


def _metadata_of_config(path: epath.Path) -> dict[str, Any]:
  """Translate a run's configuration to the metadata of a file of weights."""
  try:
    config = json.loads(path.read_text())
    options, data = dict(config['model']), dict(config['data'])
    name = options.pop('name')
  except Exception as error:  # JSON and epath raise many kinds.
    raise RunFormatError(f"'{path}' is damaged: {error!r}") from error
  fields = dataclasses.fields(preprocessing.EvalPreprocessing)
  return {
    'model': name,
    'options': {
      option: value
      for option, value in options.items()
      if value is not None and option not in _TRAINING_ONLY
    },
    **{field.name: data.get(f'eval_{field.name}') for field in fields},
  }
