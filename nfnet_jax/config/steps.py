"""The steps from a configuration to an experiment.

A configuration that `lookup` found is resolved, validated and opened, in this
order, by every command that takes one.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

import jax
import ml_collections

from nfnet_jax import errors, preprocessing
from nfnet_jax.config import experiment as experiment_lib
from nfnet_jax.config import resolve, small_data, validate
from nfnet_jax.config import workdir as workdir_lib
from nfnet_jax.data import known
from nfnet_jax.distributed import collectives
from nfnet_jax.storage import failures
from nfnet_jax.weights import network

if TYPE_CHECKING:
  from nfnet_jax.data import sources


def open_experiment(
  config: ml_collections.ConfigDict,
  *,
  workdir: os.PathLike | None = None,
  weights: network.Weights | None = None,
  trains: bool = True,
  platform: str | None = None,
  devices: int | None = None,
  memory: int | None = None,
  dataset: experiment_lib.Dataset | None = None,
) -> experiment_lib.Experiment:
  """Resolve and validate a configuration, and open its dataset.

  With several processes, process 0 resolves and validates for all of them, so
  only process 0 needs to see the workdir and the weights to start from.

  Args:
    config: see `config.lookup`.
    workdir: of the run that the configuration must belong to, if it has begun.
    weights: network whose model takes the place of the configuration's.
    trains: whether the training split and the layout on devices matter.
    platform: what it runs on, as JAX calls it; by default what is here.
    devices: how many there are; by default all that are here.
    memory: bytes of a device; by default those of the devices here, if the
      platform is not given either.
    dataset: takes the place of the configuration's.

  Raises:
    errors.InputError: in one line, what is wrong and what to do.
  """
  values = collectives.from_primary(
    lambda: prepare_config(
      config,
      workdir=workdir,
      weights=weights,
      trains=trains,
      platform=platform,
      devices=devices,
      memory=memory,
      dataset=dataset,
    ).to_dict()
  )
  resolved = ml_collections.ConfigDict(values).lock()
  return experiment_lib.Experiment(
    resolved, dataset or _open_dataset(resolved, trains)
  )


def prepare_config(
  config: ml_collections.ConfigDict,
  *,
  workdir: os.PathLike | None = None,
  weights: network.Weights | None = None,
  trains: bool = True,
  platform: str | None = None,
  devices: int | None = None,
  memory: int | None = None,
  dataset: experiment_lib.Dataset | None = None,
) -> ml_collections.ConfigDict:
  """Resolve and validate a configuration in this process.

  The dataset is opened only if settings are left to it; see `small_data`.

  Args:
    config: see `open_experiment`, like all other arguments.
    workdir: likewise.
    weights: likewise.
    trains: likewise.
    platform: likewise.
    devices: likewise.
    memory: likewise.
    dataset: likewise.

  Raises:
    errors.InputError: in one line, what is wrong and what to do.
  """
  if platform is None:
    platform, memory = jax.default_backend(), memory or _device_memory()
  machine = platform, devices or jax.device_count(), memory
  config = _set_model(config, workdir, weights)
  if not small_data.is_complete(config):
    config = small_data.complete(config, dataset or _load_dataset(config))
  resolved = resolve.resolve(config, *machine)
  validate.validate(resolved, machine[1] if trains else None)
  if workdir is not None and workdir_lib.is_run(workdir):
    saved = resolve.resolve(workdir_lib.load(workdir), *machine)
    validate.check_same_experiment(saved, resolved, os.fspath(workdir))
  return resolved


def _device_memory() -> int | None:
  """Return the bytes that programs can use on a device; None on CPUs."""
  statistics = jax.local_devices()[0].memory_stats()
  return statistics and statistics.get('bytes_limit')


def _set_model(
  config: ml_collections.ConfigDict,
  workdir: os.PathLike | None,
  weights: network.Weights | None,
) -> ml_collections.ConfigDict:
  """Return the configuration with the model of the weights to start from.

  A run that has begun does not need them any more.
  """
  if weights is not None:
    return resolve.set_model_from_weights(config, weights)
  if not config.weights:
    return config
  if workdir is not None and workdir_lib.is_run(workdir):
    saved = workdir_lib.load(workdir)
    if saved.weights == resolve.absolute(config.weights):
      return _copy_unset(saved, config)
  return resolve.set_model_from_weights(
    config, resolve.read_weights(config.weights)
  )


def _copy_unset(
  saved: ml_collections.ConfigDict, config: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
  """Return a configuration with what a begun run got from its weights."""
  config = config.copy_and_resolve_references()
  fields = dataclasses.fields(preprocessing.EvalPreprocessing)
  for section, names in (
    ('model', list(saved.model)),
    ('data', [f'eval_{field.name}' for field in fields]),
  ):
    for name in names:
      if config[section][name] is None:
        config[section][name] = saved[section][name]
  return config


def _load_dataset(config: ml_collections.ConfigDict) -> sources.Source:
  """Open the dataset of a configuration; this imports TensorFlow.

  Raises:
    errors.InputError: if it is missing.
    errors.RunError: if it cannot be read now.
  """
  folder = known.missing_folder(config.dataset, config.run.data_dir)
  if folder:
    raise errors.InputError(known.how_to_prepare(config.dataset, folder))
  from nfnet_jax.data import sources as sources_lib

  with failures.as_command_error(), errors.as_input_error():
    return sources_lib.load(config.dataset, config.run.data_dir)


def _open_dataset(
  config: ml_collections.ConfigDict, trains: bool
) -> experiment_lib.Dataset:
  """Open the dataset of a resolved configuration, and check its splits.

  Raises:
    errors.InputError: if the dataset or a split is missing.
  """
  # Process 0 builds an embedded dataset.
  with collectives.primary_first():
    source = _load_dataset(config)
    needed = {'train_split': config.data.shards} if trains else {}
    for name, minimum in {**needed, 'eval_split': 1}.items():
      split = config.data[name]
      try:
        examples = source.num_examples(split)
      except ValueError as error:
        raise validate.missing_split(name, error) from error
      validate.check_examples(name, split, examples, minimum)
      with failures.as_command_error(), errors.as_input_error():
        source.check_files(split)
  return source
