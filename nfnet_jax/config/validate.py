"""What is checked of a configuration before any data is touched."""

import functools
import os

import jax
import ml_collections

from nfnet_jax import errors
from nfnet_jax.config import base as config_lib
from nfnet_jax.config import resolve
from nfnet_jax.distributed import collectives
from nfnet_jax.models import layers, registry
from nfnet_jax.models.fast import stem
from nfnet_jax.weights import load


def resolve_to_train(
  config: ml_collections.ConfigDict, workdir: os.PathLike
) -> ml_collections.ConfigDict:
  """Resolves and checks the configuration of a run, as `resolve_and_check`.

  Of several processes only the first needs the workdir and the weights to begin
  with; and a run that has begun needs those no more.

  Raises:
    errors.InputError: in one line, what is wrong and the way out.
  """
  _check_complete(config)
  # What processes exchange next depends on it.
  with errors.as_input_error():
    collectives.assert_equal({'weights': str(config.weights)})
  if config.weights:
    config = config.copy_and_resolve_references()
    model = collectives.from_primary(lambda: _model_of_weights(config, workdir))
    unset = {name for name, value in config.model.items() if value is None}
    config.model.update({name: model[name] for name in unset})
  return resolve_and_check(config, begun=True)


def _model_of_weights(
  config: ml_collections.ConfigDict, workdir: os.PathLike
) -> dict[str, object]:
  begun = workdir.load_begun(workdir, config.weights)
  return (
    begun or set_model_from_weights(config, read_weights(config.weights))
  ).model.to_dict()


def resolve_and_check(
  config: ml_collections.ConfigDict,
  platform: str | None = None,
  devices: int | None = None,
  *,
  begun: bool = False,
) -> ml_collections.ConfigDict:
  """Resolves a configuration, and checks it as far as it goes without data.

  Args:
    config: with overrides applied.
    platform: what it shall run on, as JAX calls it; by default what is here.
    devices: how many; by default all that are here.
    begun: whether it is that of a run, which needs the weights that it began
      with no more.

  Raises:
    errors.InputError: in one line, what is wrong and the way out.
  """
  _check_complete(config)
  if config.weights and not (begun and config.model.name):
    config = set_model_from_weights(config, read_weights(config.weights))
  if config.model.name is None:
    raise errors.InputError(
      'Name a model: --config.model.name=NAME, or a trained one: '
      '--config.weights=PATH.'
    )
  with errors.as_input_error():
    spec = registry.get_model_spec(config.model.name)
  config_lib.check_ranges(config)
  config = resolve.resolve(
    config,
    spec,
    platform or jax.default_backend(),
    devices or jax.device_count(),
  )
  config_lib.check_values(config)
  model_options(config.model)
  _check_forms(config, spec)
  return config


def _check_forms(
  config: ml_collections.ConfigDict, spec: registry.ModelSpec
) -> None:
  """Checks that the step can be computed in the forms asked for."""
  run = config.run
  for form in resolve.FORMS:
    if run[form] and form not in spec.fast_paths:
      raise errors.InputError(
        f"run.{form} is for NFNets; '{spec.name}' has no such form: leave it "
        'out.'
      )
    if run[form] and resolve.unformable(config, form):
      raise errors.InputError(
        f'run.{form} holds channels in another order, and model.activation '
        f"'{config.model.activation}' works across them: leave out either."
      )
  if run.shard_update and (setting := resolve.unshardable(config)):
    raise errors.InputError(
      f'run.shard_update shares out units, which {setting} needs all of: leave '
      'out either.'
    )
  size, block = config.data.image_size, stem.BLOCK
  if run.fast_stem and size % block:
    below = size // block * block
    near = ' or '.join(str(side) for side in (below, below + block) if side)
    raise errors.InputError(
      f'run.fast_stem needs a data.image_size that is a multiple of {block}, '
      f'not {size}: leave it out, or take {near} pixels.'
    )


def _check_complete(config: ml_collections.ConfigDict) -> None:
  config_lib.check_keys(config)
  if config.dataset is None:
    raise errors.InputError('Name a dataset: --config.dataset=NAME.')


@functools.lru_cache(maxsize=1)
def read_weights(path: str) -> load.Weights:
  """Reads the weights that a run begins with, once.

  Raises:
    errors.InputError: if they cannot be used.
  """
  with errors.as_input_error():
    return load.load_weights(path)


def set_model_from_weights(
  config: ml_collections.ConfigDict, weights: load.Weights
) -> ml_collections.ConfigDict:
  """Sets a configuration's model to that of some weights.

  Raises:
    errors.InputError: if the configuration names another.
  """
  config = config.copy_and_resolve_references()
  model = config.model
  if model.name not in (None, weights.model):
    raise errors.InputError(
      f"The weights are of '{weights.model}', not of '{model.name}'; say "
      f'--config.model.name={weights.model}.'
    )
  model.name = weights.model
  for option, value in weights.options.items():
    if option not in model:
      raise errors.InputError(
        f"The weights are of a '{model.name}' with {option}={value}, which no "
        'config sets.'
      )
    if model[option] is None:
      model[option] = value
  return config


def check_same_everywhere(config: ml_collections.ConfigDict) -> None:
  """Checks that all processes resolved the same configuration.

  Raises:
    errors.InputError: with the keys that differ.
  """
  with errors.as_input_error():
    collectives.assert_equal(
      {key: str(value) for key, value in config_lib.flat(config).items()}
    )


def check_layout(
  config: ml_collections.ConfigDict, devices: int | None = None
) -> None:
  """Checks that a resolved configuration can be trained on so many devices.

  Args:
    config: resolved.
    devices: how many; by default all that are here.

  Raises:
    errors.InputError: with the arithmetic and the nearest sizes that work.
  """
  devices = devices or jax.device_count()
  check, shards = config_lib.check_divides, config.data.shards
  check('data.shards', shards, 'the number of devices', devices)
  check('batch_size', config.batch_size, 'data.shards', shards)
  mixes = config.data.mixup or config.data.cutmix
  if mixes and config.data.partners == 'in_batch':
    twice = 'twice data.shards'
    check('batch_size', config.batch_size, twice, 2 * shards)
  if (parts := config.run.accumulate) > 1:
    a_device = 'the number of devices times run.accumulate'
    check('batch_size', config.batch_size, a_device, devices * parts)
    spec = registry.get_model_spec(config.model.name)
    if spec.uses_batch_statistics:
      raise errors.InputError(
        f"'{config.model.name}' normalises batches, and run.accumulate={parts} "
        'would make them smaller: leave it out, or take a smaller batch_size.'
      )


def model_options(
  model: ml_collections.ConfigDict,
) -> dict[str, float | str]:
  """Returns the options of a model's module that a configuration sets.

  Raises:
    errors.InputError: if the model's family has no such option, or there is no
      such activation.
  """
  options = {name: value for name, value in model.items() if value is not None}
  del options['name']
  if not options['cross_replica_bn']:  # Off for all families.
    del options['cross_replica_bn']
  known = registry.get_model_spec(model.name).options
  for name in options:
    if name not in known:
      raise errors.InputError(
        f"model.{name} is no option of '{model.name}'; leave it out."
      )
  if 'activation' in options:
    with errors.as_input_error():
      layers.scaled_activation(options['activation'])
  return options
