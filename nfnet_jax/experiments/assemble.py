"""From a resolved configuration to the objects of a run."""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import inspect

import haiku
import jax
import jax.numpy as jnp
import ml_collections
import optax

import nfnet_jax
from nfnet_jax.experiments import config as config_lib
from nfnet_jax.experiments import errors
from nfnet_jax.models import complexity, layers, registry
from nfnet_jax.optim import groups, recipe
from nfnet_jax.training import loop, parallel, processes
from nfnet_jax.training import state as state_lib
from nfnet_jax.training import step as step_lib
from nfnet_jax.weights import identify, load

_REPORTED = (nfnet_jax, jax, haiku, optax)


def resolve_and_check(
  config: ml_collections.ConfigDict,
  platform: str | None = None,
  *,
  begun: bool = False,
) -> ml_collections.ConfigDict:
  """Resolves a configuration, and checks it as far as it goes without data.

  Args:
    config: with overrides applied.
    platform: what it shall run on, as JAX calls it; by default what is here.
    begun: whether it is that of a run, which needs the weights that it began
      with no more.

  Raises:
    errors.InputError: in one line, what is wrong and the way out.
  """
  config_lib.check_keys(config)
  if config.dataset is None:
    raise errors.InputError('Name a dataset: --config.dataset=NAME.')
  if config.weights and not (begun and config.model.name):
    config = adopt(config, read_weights(config.weights))
  if config.model.name is None:
    raise errors.InputError(
      'Name a model: --config.model.name=NAME, or a trained one: '
      '--config.weights=PATH.'
    )
  with errors.as_input_error():
    spec = registry.get_spec(config.model.name)
  config = config_lib.resolve(config, spec, platform or jax.default_backend())
  config_lib.check_values(config)
  model_options(config.model)
  return config


@functools.lru_cache(maxsize=1)
def read_weights(path: str) -> load.Weights:
  """Reads the weights that a run begins with, once.

  Raises:
    errors.InputError: if they cannot be used.
  """
  with errors.as_input_error():
    return load.load_weights(path)


def adopt(
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
    processes.agree(
      {key: str(value) for key, value in config_lib.flat(config).items()}
    )


def devices() -> str:
  """Says what this process computes on, and with how many others."""
  device, several = jax.devices()[0], jax.process_count()
  # A core of a TPU, which is what a device is, has a place in the pod.
  places = [d.coords for d in jax.devices() if hasattr(d, 'coords')]
  spans = [max(axis) - min(axis) + 1 for axis in zip(*places)]
  topology = f', topology {"x".join(map(str, spans))}' if spans else ''
  share = f', {jax.local_device_count()} of them here' if several > 1 else ''
  return (
    f'devices    {jax.device_count()} x {device.device_kind} '
    f'({device.platform}){topology}, process {jax.process_index()} of '
    f'{several}{share}'
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
  if options.pop('cross_replica_bn'):
    options['cross_replica_axis'] = parallel.AXIS
  family = registry.get_spec(model.name).family
  known = inspect.signature(family.__init__).parameters
  for name in options:
    if name not in known:
      setting = name.replace('cross_replica_axis', 'cross_replica_bn')
      raise errors.InputError(
        f"model.{setting} is no option of '{model.name}'; leave it out."
      )
  if 'activation' in options:
    with errors.as_input_error():
      layers.scaled_activation(options['activation'])
  return options


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What a configuration means once its dataset is open.

  Attributes:
    config: resolved.
    source: the dataset, a `data.sources.Source`.
  """

  config: ml_collections.ConfigDict
  source: object

  @classmethod
  def open(
    cls, config: ml_collections.ConfigDict, *, to_train: bool = True
  ) -> 'Experiment':
    """Opens the dataset of a resolved configuration; imports TensorFlow.

    Args:
      config: resolved.
      to_train: whether its training split is needed.

    Raises:
      errors.InputError: if the dataset or a split of it is missing.
    """
    from nfnet_jax.data import sources

    with errors.as_input_error():
      with processes.primary_first():  # It builds an embedded dataset.
        source = sources.load(config.dataset, config.run.data_dir)
      needed = {'train_split': config.data.shards} if to_train else {}
      for name, least in {**needed, 'eval_split': 1}.items():
        split = config.data[name]
        examples = source.num_examples(split)
        if examples < least:
          raise errors.InputError(
            f"data.{name} '{split}' has {examples} examples; it needs at least "
            f'{least}, {"one a data shard" if least > 1 else "to evaluate"}.'
          )
        source.check_files(split)
    return cls(config, source)

  @functools.cached_property
  def units(self) -> config_lib.Units:
    examples = self.source.num_examples(self.config.data.train_split)
    return config_lib.Units(self.config.batch_size, examples)

  @functools.cached_property
  def cadence(self) -> loop.Cadence:
    run, steps = self.config.run, self.units.steps
    total = int(steps(self.config.train_for))
    if not total:
      raise errors.InputError(
        f"train_for '{self.config.train_for}' is less than one step of "
        f'{self.config.batch_size} examples.'
      )
    return loop.Cadence(
      total=total,
      log=max(1, steps(run.log_every)),
      evaluate=max(1, steps(run.eval_every)),
      checkpoint=max(1, steps(run.checkpoint_every)),
    )

  @functools.cached_property
  def model(self) -> registry.Model:
    options = model_options(self.config.model)
    name, num_classes = self.config.model.name, self.source.num_classes
    return registry.create(name, num_classes, **options)

  @functools.cached_property
  def trainer(self) -> step_lib.Trainer:
    config, optimizer = self.config, self.config.optimizer
    schedule = self._schedule()
    return step_lib.Trainer(
      model=self.model,
      optimizer=recipe.nfnet_sgd(
        schedule,
        momentum=optimizer.momentum,
        nesterov=optimizer.nesterov,
        rms_decay=optimizer.rms_decay,
        weight_decay=optimizer.weight_decay,
        clipping=optimizer.clipping or None,
        clip_by=optimizer.clip_by,
        trust_coefficient=optimizer.trust_coefficient,
      ),
      schedule=schedule,
      num_classes=self.source.num_classes,
      global_batch=config.batch_size,
      seed=config.seed,
      label_smoothing=config.label_smoothing,
      ema_decay=config.ema_decay,
      compute_dtype=jnp.dtype(config.compute_dtype),
      sam_rho=optimizer.sam_rho,
      sam_share=optimizer.sam_share,
    )

  def _schedule(self) -> optax.Schedule:
    optimizer, steps = self.config.optimizer, self.units.steps
    peak, warmup = optimizer.learning_rate, steps(optimizer.warmup)
    if optimizer.decay_every:
      return recipe.warmup_stairs(
        peak, warmup, optimizer.decay_factor, steps(optimizer.decay_every)
      )
    return recipe.warmup_cosine(
      peak, warmup, self.cadence.total, optimizer.final_learning_rate
    )

  def create_state(self) -> state_lib.TrainState:
    """Initialises the run's state, from weights if there are any."""
    state = state_lib.create_state(
      self.trainer.model,
      self.trainer.optimizer,
      seed=self.config.seed,
      image_size=self.config.data.image_size,
    )
    if self.config.weights:
      weights = read_weights(self.config.weights)
      read_weights.cache_clear()  # The run needs them no more.
      state = _start_from(state, weights, self.source.num_classes)
    return state

  def abstract_state(self) -> state_lib.TrainState:
    """Returns the state's shapes and dtypes."""
    return state_lib.abstract_state(
      self.trainer.model, self.trainer.optimizer, self.config.data.image_size
    )

  def train_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a global batch; see `pipeline.train_batches`."""
    data, count = self.config.data, self.config.batch_size
    labels = 2 if data.mixup or data.cutmix else 1
    size = data.image_size
    pixels = jnp.uint8 if data.randaugment_layers else jnp.float32
    shape = jax.ShapeDtypeStruct
    return {
      'image': shape((count, size, size, 3), pixels),
      'label': shape((count, labels), jnp.int32),
      'weight': shape((count, labels), jnp.float32),
      'position': shape((count,), jnp.int32),
      'step': shape((), jnp.int32),
    }

  def train_batches(
    self, first_step: int, note: Callable[[str], None]
  ) -> Iterator[loop.Batch]:
    """Streams this process's training batches from a step on."""
    from nfnet_jax.data import examples, pipeline

    data = self.config.data
    augmentation = examples.Augmentation(
      crop=data.crop,
      flip=data.flip,
      shift=data.shift,
      mixup=data.mixup,
      cutmix=data.cutmix,
      partners=data.partners,
      layers=data.randaugment_layers,
      magnitude=data.randaugment_magnitude,
    )
    spec = pipeline.TrainSpec(
      source=self.source,
      split=data.train_split,
      batch_size=self.config.batch_size,
      image_size=data.image_size,
      shards=data.shards,
      seed=self.config.seed,
      augmentation=augmentation,
      shuffle_buffer=data.shuffle_buffer,
      max_bad_records=self.config.run.max_bad_records,
    )
    with self._as_input_error():
      yield from pipeline.train_batches(
        spec, first_step, jax.process_index(), jax.process_count(), note
      )

  def eval_batches(self, note: Callable[[str], None]) -> Iterator[loop.Batch]:
    """Streams this process's padded evaluation batches."""
    from nfnet_jax.data import pipeline

    data, run, devices = self.config.data, self.config.run, jax.device_count()
    with self._as_input_error():
      yield from pipeline.eval_batches(
        self.source,
        data.eval_split,
        # Rounded up: padding is masked, so any number of devices will do.
        batch_size=-(-run.eval_batch_size // devices) * devices,
        image_size=data.eval_size,
        crop=data.eval_crop,
        margin=data.eval_margin,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        max_bad_records=run.max_bad_records,
        note=note,
      )

  def _as_input_error(self):
    from nfnet_jax.data import faults

    return errors.as_input_error(faults.BadDataError)

  def summary(self) -> str:
    """Says what is about to run, for the start of the log."""
    config, model = self.config, self.trainer.model
    state = self.abstract_state()
    params = state.params
    size = config.data.eval_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    macs = complexity.count_macs(
      lambda p, s, i: model.apply(p, s, None, i, False)[0],
      params,
      state.model_state,
      images,
    )
    total = self.cadence.total
    epochs = total * config.batch_size / self.units.examples
    warmup = self.units.steps(config.optimizer.warmup)
    peak = config.optimizer.learning_rate * min(1, total / max(warmup, 1e-9))
    cut = ' (warm-up is longer than the run)' if warmup > total else ''
    return '\n'.join(
      [
        f'model      {config.model.name}: '
        f'{complexity.count_parameters(params):,} parameters, '
        f'{macs / 1e9:.3g} G multiply-adds at {size} px',
        *self._origin(),
        f'data       {config.dataset}: {self.units.examples:,} images, '
        f'{self.source.num_classes} classes, {config.data.shards} shards',
        f'images     {_images(config.data)}',
        f'run        {total:,} steps of {config.batch_size} '
        f'({epochs:.1f} epochs), peak learning rate {peak:g}{cut}, '
        f'{config.compute_dtype}',
        f'optimiser  {_optimizer(config.optimizer)}',
        devices(),
        'versions   '
        + ', '.join(f'{m.__name__} {m.__version__}' for m in _REPORTED),
        '',
        groups.group_table(params),
      ]
    )

  def _origin(self) -> list[str]:
    """Says what weights the run begins with, if not with random ones."""
    if not self.config.weights:
      return []
    before = read_weights(self.config.weights).num_classes
    now = self.source.num_classes
    head = '' if before == now else f', classifier new ({before} classes there)'
    return [f'weights    {self.config.weights}{head}']


def _start_from(
  state: state_lib.TrainState, weights: load.Weights, num_classes: int
) -> state_lib.TrainState:
  """Puts trained weights in the place of initial ones.

  The classifier stays the initial one where the number of classes differs, and
  only then.
  """
  params = dict(weights.params)
  if weights.num_classes != num_classes:
    path = identify.classifier_path(params)
    params[path] = state.params[path]
  # A step takes the state's buffers over: they must not be those of NumPy, nor
  # twice the same.
  own = lambda tree: jax.tree.map(jnp.array, dict(tree))
  return state._replace(
    params=own(params),
    model_state=own(weights.model_state),
    ema_params=own(params),
    ema_model_state=own(weights.model_state),
  )


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
