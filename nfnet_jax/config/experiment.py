"""From a resolved configuration to the objects of a run."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
import optax

from nfnet_jax import errors, preprocessing
from nfnet_jax.config import base as config_lib
from nfnet_jax.config import resolve, validate
from nfnet_jax.distributed import collectives
from nfnet_jax.models import registry
from nfnet_jax.models.fast import stem
from nfnet_jax.optim import recipe
from nfnet_jax.training import loop, sharded_update
from nfnet_jax.training import state as state_lib
from nfnet_jax.training import step as step_lib
from nfnet_jax.weights import identify, load


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
      with collectives.primary_first():  # It builds an embedded dataset.
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
    """The network in the form that runs."""
    run = self.config.run
    forms = {form: True for form in resolve.FORMS if run[form]}
    return self._create_model(**forms) if forms else self.plain_model

  @functools.cached_property
  def plain_model(self) -> registry.Model:
    """The network as published, whose multiply-adds are counted."""
    return self._create_model()

  def _create_model(self, **form) -> registry.Model:
    options = validate.model_options(self.config.model)
    name, num_classes = self.config.model.name, self.source.num_classes
    return registry.create(name, num_classes, **options, **form)

  @functools.cached_property
  def trainer(self) -> step_lib.Trainer:
    config, optimizer = self.config, self.config.optimizer
    schedule = self._schedule()
    return step_lib.Trainer(
      model=self.model,
      optimizer=recipe.make_optimizer(
        schedule,
        momentum=optimizer.momentum,
        nesterov=optimizer.nesterov,
        rms_decay=optimizer.rms_decay,
        weight_decay=optimizer.weight_decay,
        clipping=optimizer.clipping,
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
      remat=config.run.remat,
      accumulate=config.run.accumulate,
    )

  def sharded_trainer(
    self, devices: int
  ) -> sharded_update.ShardedTrainer | None:
    """Returns the trainer with its update sharded, if it is to be."""
    if not self.config.run.shard_update or devices == 1:
      return None
    return sharded_update.ShardedTrainer(
      self.trainer, self.abstract_state(), devices
    )

  def _schedule(self) -> optax.Schedule:
    optimizer, steps = self.config.optimizer, self.units.steps
    peak, warmup = optimizer.learning_rate, steps(optimizer.warmup)
    if optimizer.decay_every:
      every = steps(optimizer.decay_every)
      if every < 1:
        raise errors.InputError(
          f"optimizer.decay_every '{optimizer.decay_every}' is less than one "
          f'step of {self.config.batch_size} examples.'
        )
      return recipe.warmup_step_decay(
        peak, warmup, optimizer.decay_factor, every
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
      weights = validate.read_weights(self.config.weights)
      validate.read_weights.cache_clear()  # The run needs them no more.
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
    block = self._block
    side = data.image_size // block
    pixels = jnp.uint8 if data.randaugment_layers else jnp.float32
    shape = jax.ShapeDtypeStruct
    return {
      'image': shape((count, side, side, 3 * block**2), pixels),
      'label': shape((count, labels), jnp.int32),
      'weight': shape((count, labels), jnp.float32),
      'position': shape((count,), jnp.int32),
      'step': shape((), jnp.int32),
    }

  @property
  def _block(self) -> int:
    """Pixels a side of the blocks that training images come in."""
    return stem.BLOCK if self.config.run.fast_stem else 1

  def train_batches(
    self, first_step: int, log_fn: Callable[[str], None]
  ) -> Iterator[loop.Batch]:
    """Streams this process's training batches from a step on."""
    from nfnet_jax.data import pipeline

    data = self.config.data
    fields = dataclasses.fields(preprocessing.Augmentation)
    augmentation = preprocessing.Augmentation(
      **{field.name: data[field.name] for field in fields}
    )
    spec = pipeline.TrainSpec(
      source=self.source,
      split=data.train_split,
      batch_size=self.config.batch_size,
      image_size=data.image_size,
      shards=data.shards,
      seed=self.config.seed,
      augmentation=augmentation,
      block=self._block,
      shuffle_buffer=data.shuffle_buffer,
      max_bad_records=self.config.run.max_bad_records,
    )
    with self._telling_faults():
      yield from pipeline.train_batches(
        spec, first_step, jax.process_index(), jax.process_count(), log_fn
      )

  def eval_batches(self, log_fn: Callable[[str], None]) -> Iterator[loop.Batch]:
    """Streams this process's padded evaluation batches."""
    from nfnet_jax.data import pipeline

    data, run, devices = self.config.data, self.config.run, jax.device_count()
    with self._telling_faults():
      yield from pipeline.eval_batches(
        self.source,
        data.eval_split,
        # Rounded up: padding is masked, so any number of devices will do.
        batch_size=-(-run.eval_batch_size // devices) * devices,
        preprocessing=preprocessing.EvalPreprocessing(
          data.eval_size, data.eval_crop, data.eval_margin
        ),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        max_bad_records=run.max_bad_records,
        log_fn=log_fn,
      )

  @contextlib.contextmanager
  def _telling_faults(self):
    from nfnet_jax.data import faults

    try:
      yield
    except faults.BadDataError as error:
      raise errors.InputError(str(error)) from error
    except faults.ReadError as error:
      raise errors.RunError(
        f'{error}. The same command tries again.'
      ) from error


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
