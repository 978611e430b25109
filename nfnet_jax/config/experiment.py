"""What a configuration means: the objects of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_collections
import optax

from nfnet_jax import errors, preprocessing
from nfnet_jax.config import base, durations, fast_paths, resolve, validate
from nfnet_jax.models import registry
from nfnet_jax.models.fast import stem
from nfnet_jax.optim import recipe
from nfnet_jax.training import layouts, loop
from nfnet_jax.training import state as state_lib
from nfnet_jax.training import step as step_lib
from nfnet_jax.weights import identify, network


class Dataset(Protocol):
  """What an experiment needs to know of its data; a `data.sources.Source`."""

  @property
  def num_classes(self) -> int:
    """Number of classes."""

  @property
  def splits(self) -> Sequence[str]:
    """Names of the splits."""

  def num_examples(self, split: str) -> float:
    """Return the number of examples of a split."""


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What a configuration means: model, optimiser, datasets, trainer.

  Attributes:
    config: resolved and validated.
    source: the dataset.
  """

  config: ml_collections.ConfigDict
  source: Any

  @functools.cached_property
  def units(self) -> durations.Units:
    """How durations become steps."""
    with errors.as_input_error():
      examples = self.source.num_examples(self.config.data.train_split)
    return durations.Units(self.config.batch_size, examples)

  @functools.cached_property
  def cadence(self) -> loop.Cadence:
    """The length of the run and its intervals."""
    validate.check_steps(self.config, self.units)
    run, steps = self.config.run, self.units.steps
    return loop.Cadence(
      total=int(steps(self.config.train_for)),
      log=max(1, steps(run.log_every)),
      evaluate=max(1, steps(run.eval_every)),
      checkpoint=max(1, steps(run.checkpoint_every)),
    )

  @property
  def augmentation(self) -> preprocessing.Augmentation:
    """What is done to training images."""
    return base.read_fields(preprocessing.Augmentation, self.config.data)

  @property
  def preprocessing(self) -> preprocessing.EvalPreprocessing:
    """What evaluation does to images."""
    return base.read_fields(
      preprocessing.EvalPreprocessing, self.config.data, 'eval_'
    )

  @functools.cached_property
  def fast_paths(self) -> tuple[str, ...]:
    """Names of the chosen fast paths."""
    return fast_paths.names(self.config.run.fast_paths)

  @functools.cached_property
  def model(self) -> registry.Model:
    """The network with its fast paths."""
    chosen = registry.get_model_spec(self.config.model.name).fast_paths
    return self._create_model(
      {name: True for name in self.fast_paths if name in chosen}
    )

  @functools.cached_property
  def plain_model(self) -> registry.Model:
    """The network without fast paths, whose multiply-adds are counted."""
    return self._create_model({})

  def _create_model(self, options: Mapping[str, bool]) -> registry.Model:
    settings = self.config.model.to_dict()
    name = settings.pop('name')
    given = {key: v for key, v in settings.items() if v is not None}
    num_classes = self.source.num_classes
    return registry.create_model(name, num_classes, **given, **options)

  @functools.cached_property
  def trainer(self) -> step_lib.Trainer:
    """The training step with a replicated state; see `trainer_on`."""
    return self.trainer_with({})

  def trainer_with(
    self, values: Mapping[str, Any], **options: Any
  ) -> step_lib.Trainer:
    """Return the training step with other values of some settings.

    The values may be traced: that compiles one step for all of them.

    Args:
      values: by dotted names of settings, such as 'optimizer.learning_rate'.
        Only those that the optimiser, the loss and the random keys depend on
        have an effect.
      **options: of `recipe.make_optimizer` that are no settings: `eps` and
        `groups`.
    """
    setting = {**base.flat(self.config), **values}
    schedule = self._schedule(setting)
    return step_lib.Trainer(
      model=self.model,
      optimizer=recipe.make_optimizer(
        schedule,
        momentum=setting['optimizer.momentum'],
        nesterov=setting['optimizer.nesterov'],
        rms_decay=setting['optimizer.rms_decay'],
        weight_decay=setting['optimizer.weight_decay'],
        clipping=setting['optimizer.clipping'],
        clip_by=setting['optimizer.clip_by'],
        clip_statistics=setting['optimizer.clip_statistics'],
        trust_coefficient=setting['optimizer.trust_coefficient'],
        **options,
      ),
      schedule=schedule,
      num_classes=self.source.num_classes,
      global_batch=setting['batch_size'],
      seed=setting['seed'],
      label_smoothing=setting['label_smoothing'],
      ema_decay=setting['ema_decay'],
      compute_dtype=jnp.dtype(setting['compute_dtype']),
      sam_rho=setting['optimizer.sam_rho'],
      sam_share=setting['optimizer.sam_share'],
      remat=setting['run.remat'],
      accumulate=setting['run.accumulate'],
    )

  def trainer_on(self, devices: int) -> step_lib.Trainer:
    """Return the training step for a number of devices."""
    if fast_paths.SHARD_UPDATE not in self.fast_paths or devices == 1:
      return self.trainer
    layout = layouts.shard_kernels(self.abstract_state(), devices)
    return dataclasses.replace(self.trainer, layout=layout)

  def _schedule(self, setting: Mapping[str, Any]) -> optax.Schedule:
    steps, peak = self.units.steps, setting['optimizer.learning_rate']
    warmup = steps(setting['optimizer.warmup'])
    if setting['optimizer.decay_every']:
      factor = setting['optimizer.decay_factor']
      every = steps(setting['optimizer.decay_every'])
      return recipe.warmup_step_decay(peak, warmup, factor, every)
    final = setting['optimizer.final_learning_rate']
    return recipe.warmup_cosine(peak, warmup, self.cadence.total, final)

  def create_state(self) -> state_lib.TrainState:
    """Initialise the state of the run, from weights if it starts from any."""
    state = state_lib.create_state(
      self.trainer.model,
      self.trainer.optimizer,
      seed=self.config.seed,
      image_size=self.config.data.image_size,
    )
    if self.config.weights:
      weights = resolve.read_weights(self.config.weights)
      resolve.read_weights.cache_clear()  # The run does not need them again.
      state = _start_from(state, weights, self.source.num_classes)
    return state

  def abstract_state(self) -> state_lib.TrainState:
    """Return the shapes and dtypes of the state."""
    return state_lib.abstract_state(
      self.trainer.model, self.trainer.optimizer, self.config.data.image_size
    )

  def train_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a global batch; see `pipeline.train_batches`."""
    data, count = self.config.data, self.config.batch_size
    labels = 2 if data.mixup or data.cutmix else 1
    block = self._block
    side = data.image_size // block
    pixels = jnp.uint8 if self.augmentation.makes_uint8 else jnp.float32
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
    """Side of the pixel blocks in which training images come."""
    return stem.BLOCK if 'fast_stem' in self.fast_paths else 1

  def train_batches(
    self, first_step: int, log_fn: Callable[[str], None]
  ) -> Iterator[loop.Batch]:
    """Stream the training batches of this process, starting at a step."""
    from nfnet_jax.data import pipeline

    data = self.config.data
    spec = pipeline.TrainSpec(
      source=self.source,
      split=data.train_split,
      batch_size=self.config.batch_size,
      image_size=data.image_size,
      shards=data.shards,
      seed=self.config.seed,
      augmentation=self.augmentation,
      block=self._block,
      shuffle_buffer=data.shuffle_buffer,
      max_bad_records=self.config.run.max_bad_records,
    )
    with self._reporting_faults():
      yield from pipeline.train_batches(
        spec, first_step, jax.process_index(), jax.process_count(), log_fn
      )

  def eval_batches(self, log_fn: Callable[[str], None]) -> Iterator[loop.Batch]:
    """Stream the padded evaluation batches of this process."""
    from nfnet_jax.data import pipeline

    data, run, devices = self.config.data, self.config.run, jax.device_count()
    with self._reporting_faults():
      yield from pipeline.eval_batches(
        self.source,
        data.eval_split,
        # Rounded up: padding is masked, so any number of devices will do.
        batch_size=-(-run.eval_batch_size // devices) * devices,
        preprocessing=self.preprocessing,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        max_bad_records=run.max_bad_records,
        log_fn=log_fn,
      )

  def check_data(self) -> list[str]:
    """Return warnings about the data, after a quick check of its images.

    Raises:
      errors.InputError: if images of a folder cannot be read, more than
        `run.max_bad_records`.
    """
    from nfnet_jax.data import data_checks

    with self._reporting_faults():
      return list(
        data_checks.warnings(
          self.source,
          self.config.data.train_split,
          self.config.data.eval_split,
          max_bad_records=self.config.run.max_bad_records,
        )
      )

  @contextlib.contextmanager
  def _reporting_faults(self) -> Iterator[None]:
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
  state: state_lib.TrainState, weights: network.Weights, num_classes: int
) -> state_lib.TrainState:
  """Return a state with trained weights instead of initial ones.

  The classifier keeps its initial weights if the number of classes differs.
  """
  params = dict(weights.params)
  if weights.num_classes != num_classes:
    path = identify.classifier_path(params)
    params[path] = state.params[path]
  # A step donates the buffers of the state: they must not belong to NumPy, and
  # none may occur twice.
  own = lambda tree: jax.tree.map(jnp.array, dict(tree))
  return state._replace(
    params=own(params),
    model_state=own(weights.model_state),
    ema_params=own(params),
    ema_model_state=own(weights.model_state),
  )
