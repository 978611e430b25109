"""The summary that a run logs before it starts."""

from __future__ import annotations

import contextlib

import haiku
import jax
import ml_collections
import optax

import nfnet_jax
from nfnet_jax import errors
from nfnet_jax.config import experiment as experiment_lib
from nfnet_jax.config import fast_paths, resolve
from nfnet_jax.models import complexity
from nfnet_jax.optim import groups

_REPORTED = (nfnet_jax, jax, haiku, optax)


def summary(
  experiment: experiment_lib.Experiment, cache_folder: str | None = None
) -> str:
  """Return the summary of what is about to run.

  Args:
    experiment: the run.
    cache_folder: where compiled programs are stored, if they are.
  """
  config, params = experiment.config, experiment.abstract_state().params
  return '\n'.join(
    [
      f'model      {_model(experiment)}',
      *_origin(experiment),
      f'data       {config.dataset}: {experiment.units.examples:,} images, '
      f'{experiment.source.num_classes} classes, {config.data.shards} shards',
      *_held_out(experiment),
      f'images     {config.data.image_size} px, '
      f'{experiment.augmentation.describe()}',
      f'run        {_schedule(experiment)}, {config.compute_dtype}'
      f'{_step(config.run)}',
      f'optimiser  {_optimizer(config.optimizer)}',
      devices(),
      *([f'programs   {cache_folder}'] if cache_folder else []),
      'versions   '
      + ', '.join(f'{m.__name__} {m.__version__}' for m in _REPORTED),
      '',
      groups.group_table(params),
    ]
  )


def devices() -> str:
  """Return a line on the devices of this process."""
  device, count = jax.devices()[0], jax.process_count()
  # A device of a TPU has coordinates in the pod.
  places = [d.coords for d in jax.devices() if hasattr(d, 'coords')]
  spans = [max(axis) - min(axis) + 1 for axis in zip(*places)]
  topology = f', topology {"x".join(map(str, spans))}' if spans else ''
  here = f'{jax.local_device_count()} of them here'
  return (
    f'devices    {jax.device_count()} x {device.device_kind} '
    f'({device.platform}){topology}, '
    f'{here if count > 1 else "process 0 of 1"}'
  )


def _model(experiment: experiment_lib.Experiment) -> str:
  state, size = experiment.abstract_state(), experiment.preprocessing.size
  macs = complexity.count_image_macs(
    experiment.plain_model, state.params, state.model_state, size
  )
  return (
    f'{experiment.config.model.name}: '
    f'{complexity.count_parameters(state.params):,} parameters, '
    f'{macs / 1e9:.3g} G multiply-adds at {size} px'
  )


def _origin(experiment: experiment_lib.Experiment) -> list[str]:
  """Return a line on the weights that the run starts from, if any."""
  path = experiment.config.weights
  if not path:
    return []
  before = now = experiment.source.num_classes
  # A run that has begun does not need them any more.
  with contextlib.suppress(errors.InputError):
    before = resolve.read_weights(path).num_classes
  head = '' if before == now else f', classifier new ({before} classes there)'
  return [f'weights    {path}{head}']


def _held_out(experiment: experiment_lib.Experiment) -> list[str]:
  """Return a line on the part of a split that is held out, if one is."""
  split = experiment.config.data.eval_split
  if '[' not in split:
    return []
  count = experiment.source.num_examples(split)
  return [f'evaluation {split}: {count:,} images']


def _schedule(experiment: experiment_lib.Experiment) -> str:
  config, total = experiment.config, experiment.cadence.total
  epochs = total * config.batch_size / experiment.units.examples
  return (
    f'{total:,} steps of {config.batch_size} ({epochs:.1f} epochs), '
    f'peak learning rate {config.optimizer.learning_rate:g}'
  )


def _step(run: ml_collections.ConfigDict) -> str:
  """Return how a step saves memory or time."""
  titles = fast_paths.titles(run.fast_paths)
  if jax.device_count() == 1:
    titles.pop(fast_paths.SHARD_UPDATE, None)
  parts = [
    f'{run.accumulate} microbatches' if run.accumulate > 1 else '',
    'blocks recomputed' if run.remat else '',
    *titles.values(),
  ]
  return ''.join(f', {part}' for part in parts if part)


def _optimizer(optimizer: ml_collections.ConfigDict) -> str:
  """Return how gradients become updates."""
  clipping = f'clipping {optimizer.clipping:g} by {optimizer.clip_by}'
  trust = f'trust coefficient {optimizer.trust_coefficient}'
  sam = f'SAM rho {optimizer.sam_rho:g} on {100 * optimizer.sam_share:g} %'
  parts = [
    'SGD' if optimizer.rms_decay is None else 'RMSProp',
    f'{"Nesterov " if optimizer.nesterov else ""}momentum {optimizer.momentum}',
    f'weight decay {optimizer.weight_decay:g}',
    clipping if optimizer.clipping else 'no clipping',
    '' if optimizer.trust_coefficient is None else trust,
    sam if optimizer.sam_rho else '',
  ]
  return ', '.join(filter(None, parts))
