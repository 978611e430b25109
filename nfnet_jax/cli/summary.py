"""What a run says about itself before it starts."""

import contextlib

import haiku
import jax
import ml_collections
import optax

import nfnet_jax
from nfnet_jax import errors
from nfnet_jax.config import experiment as experiment_lib
from nfnet_jax.config import validate
from nfnet_jax.models import complexity
from nfnet_jax.optim import groups
from nfnet_jax.training import forms

_REPORTED = (nfnet_jax, jax, haiku, optax)


def summary(
  experiment: experiment_lib.Experiment, programs: str | None = None
) -> str:
  """Says what is about to run, for the start of the log.

  Args:
    experiment: checked.
    programs: where compiled ones are kept, if they may be.
  """
  config, model = experiment.config, experiment.plain_model
  state = experiment.abstract_state()
  params = state.params
  size = config.data.eval_size
  macs = complexity.count_image_macs(model, params, state.model_state, size)
  total = experiment.cadence.total
  epochs = total * config.batch_size / experiment.units.examples
  warmup = experiment.units.steps(config.optimizer.warmup)
  peak = config.optimizer.learning_rate * min(1, total / max(warmup, 1e-9))
  cut = ' (warm-up is longer than the run)' if warmup > total else ''
  return '\n'.join(
    [
      f'model      {config.model.name}: '
      f'{complexity.count_parameters(params):,} parameters, '
      f'{macs / 1e9:.3g} G multiply-adds at {size} px',
      *_origin(experiment),
      f'data       {config.dataset}: {experiment.units.examples:,} images, '
      f'{experiment.source.num_classes} classes, {config.data.shards} shards',
      f'images     {_images(config.data)}',
      f'run        {total:,} steps of {config.batch_size} '
      f'({epochs:.1f} epochs), peak learning rate {peak:g}{cut}, '
      f'{config.compute_dtype}{_form(config.run)}',
      f'optimiser  {_optimizer(config.optimizer)}',
      devices(),
      *([f'programs   {programs}'] if programs else []),
      'versions   '
      + ', '.join(f'{m.__name__} {m.__version__}' for m in _REPORTED),
      '',
      groups.group_table(params),
    ]
  )


def devices() -> str:
  """Says what this process computes on.

  Of several processes, each has said which it is: see `several.distributed_session`.
  """
  device, several = jax.devices()[0], jax.process_count()
  # A core of a TPU, which is what a device is, has a place in the pod.
  places = [d.coords for d in jax.devices() if hasattr(d, 'coords')]
  spans = [max(axis) - min(axis) + 1 for axis in zip(*places)]
  topology = f', topology {"x".join(map(str, spans))}' if spans else ''
  here = f'{jax.local_device_count()} of them here'
  share = here if several > 1 else 'process 0 of 1'
  return (
    f'devices    {jax.device_count()} x {device.device_kind} '
    f'({device.platform}){topology}, {share}'
  )


def _origin(experiment: experiment_lib.Experiment) -> list[str]:
  """Says what weights the run begins with, if not with random ones."""
  if not experiment.config.weights:
    return []
  before = now = experiment.source.num_classes
  # A run that has begun goes on without them.
  with contextlib.suppress(errors.InputError):
    before = validate.read_weights(experiment.config.weights).num_classes
  head = '' if before == now else f', classifier new ({before} classes there)'
  return [f'weights    {experiment.config.weights}{head}']


def _form(run: ml_collections.ConfigDict) -> str:
  """Says how a step saves memory or time, if it does."""
  shards = run.shard_update and jax.device_count() > 1
  settings = {**run, 'shard_update': shards}
  said = forms.savings(settings) + forms.names(settings)
  return ''.join(f', {each}' for each in said)


def _optimizer(optimizer: ml_collections.ConfigDict) -> str:
  """Says how gradients become updates."""
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


def _images(data: ml_collections.ConfigDict) -> str:
  """Says what is done to training images."""
  mixing = ' and '.join(
    name
    for name, used in (('MixUp', data.mixup), ('CutMix', data.cutmix))
    if used
  )
  layers = data.randaugment_layers
  parts = [
    f'{data.image_size} px',
    f'{data.crop} crop',
    'flip' if data.flip else '',
    f'shift {data.shift} px' if data.shift else '',
    f'{mixing} ({data.partners})' if mixing else '',
    f'RandAugment {layers} x {data.randaugment_magnitude}' if layers else '',
  ]
  return ', '.join(filter(None, parts))
