"""The programs that are timed: training and inference of a network."""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

import nfnet_jax
from nfnet_jax import trees
from nfnet_jax.models import complexity, inputs
from nfnet_jax.models.fast import stem
from nfnet_jax.optim import recipe
from nfnet_jax.training import data_parallel
from nfnet_jax.training import state as state_lib
from nfnet_jax.training import step as step_lib

TRAIN, INFER, TIMM = 'train', 'infer', 'timm'
PLAIN = 'plain'
# Form of the step -> options of the network's constructor.
FORMS = {
  PLAIN: {},
  'fast stem': {'fast_stem': True},
  'fused blocks': {'fused_blocks': True},
  'stem and blocks': {'fast_stem': True, 'fused_blocks': True},
  'fast convolutions': {'fast_convs': True},
  'all': {'fast_stem': True, 'fused_blocks': True, 'fast_convs': True},
}
# Name that may follow a form after a comma -> compiler options.
FLAGS = {
  'autotune level 0': {'xla_gpu_autotune_level': 0},
  'no command buffers': {'xla_gpu_enable_command_buffer': ''},
  'NCHW': {'xla_gpu_force_conv_nchw': True},
  'convolution fusion': {'xla_gpu_experimental_enable_conv_fusion': True},
}
WINDOW = 4  # Steps that are dispatched before the clock is read.


@dataclasses.dataclass(frozen=True)
class Group:
  """Forms of one network that are timed in turn, in several rounds."""

  task: str
  model: str
  pixels: int
  batch: int
  forms: Sequence[str]
  compute: str = 'bfloat16'

  @property
  def key(self) -> tuple:
    return self.task, self.model, self.pixels, self.batch, self.compute


def options_of(form: str) -> tuple[dict, dict]:
  """Return the network's and the compiler's options of a form."""
  form, _, flag = form.partition(', ')
  return FORMS[form], FLAGS.get(flag, {})


class Training:
  """The training step of the paper's recipe, on one device."""

  def __init__(self, group: Group, states: dict[str, state_lib.TrainState]):
    self.group = group
    self.parallel = data_parallel.DataParallel(jax.local_devices()[:1])
    self._states = states

  def trace(self, form: str) -> jax.stages.Lowered:
    """Return a form's step before compilation."""
    trainer = self._trainer(options_of(form)[0])
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._batch(form)
    )
    state = state_lib.abstract_state(
      trainer.model, trainer.optimizer, self.group.pixels
    )
    return self.parallel.lower(trainer, state, shapes)

  def prepare(self, forms: Iterable[str]) -> None:
    """Put the state and each form's batch on the device."""
    if self.group.model not in self._states:
      self.reset()
    self._batches = {
      form: self.parallel.shard_batch(self._batch(form)) for form in forms
    }

  def reset(self) -> None:
    """Create a new state."""
    self._states.pop(self.group.model, None)
    trainer = self._trainer({})
    shapes = state_lib.abstract_state(
      trainer.model, trainer.optimizer, self.group.pixels
    )
    params = make_params(shapes.params)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    state = state._replace(params=params, ema_params=params)
    state = self.parallel.shard_state(trainer.layout, state)
    self._states[self.group.model] = state

  def run(self, form: str, program: jax.stages.Compiled, steps: int) -> float:
    """Make steps from the current state; return seconds per step.

    Raises:
      ArithmeticError: if a step was not applied.
    """
    state = self._states[self.group.model]
    first = int(state.step)
    numbers = [
      self.parallel.shard_batch({'step': np.int32(first + i)})
      for i in range(steps)
    ]
    batch = self._batches[form]
    jax.block_until_ready((state, numbers, batch))
    start = time.perf_counter()
    for number in numbers:
      state, metrics = program(state, {**batch, **number})
    jax.block_until_ready((state, metrics))
    seconds = time.perf_counter() - start
    self._states[self.group.model] = state
    if not metrics['applied']:
      raise ArithmeticError(f'not applied: {jax.device_get(metrics)}')
    return seconds / steps

  def _trainer(self, network: dict) -> step_lib.Trainer:
    batch = self.group.batch
    name = self.group.model
    agc = 'nfnet' in name and not name.endswith('_bn')
    steps_per_epoch = 1_281_167 / batch
    schedule = recipe.warmup_cosine(
      0.1 * batch / 256, 5 * steps_per_epoch, 360 * steps_per_epoch
    )
    return step_lib.Trainer(
      model=nfnet_jax.create(
        self.group.model,
        stochdepth_rate=0.25 if 'nf' in name else 0.0,
        **network,
      ),
      optimizer=nfnet_jax.nfnet_sgd(schedule, clipping=0.01 if agc else 0),
      schedule=schedule,
      num_classes=1000,
      global_batch=batch,
      compute_dtype=jnp.dtype(self.group.compute),
    )

  def _batch(self, form: str) -> dict[str, np.ndarray]:
    """Return random images with two labels each, as after MixUp or CutMix."""
    rng = np.random.default_rng(0)
    count, size = self.group.batch, self.group.pixels
    images = rng.integers(0, 256, (count, size, size, 3), np.uint8)
    if options_of(form)[0].get('fast_stem'):
      # The input pipeline also delivers blocks.
      images = np.asarray(stem.to_blocks(images))
    return {
      'image': images,
      'label': rng.integers(0, 1000, (count, 2), np.int32),
      'weight': np.full((count, 2), 0.5, np.float32),
      'position': np.arange(count, dtype=np.int32),
      'step': np.int32(0),
    }


class Inference:
  """Inference on images that are on the device."""

  def __init__(self, group: Group):
    self.group = group
    self._dtype = jnp.dtype(group.compute)
    count, size = group.batch, group.pixels
    rng = np.random.default_rng(0)
    self._images = rng.integers(0, 256, (count, size, size, 3), np.uint8)
    self._weights = weight_shapes(group.model, size)

  def trace(self, form: str) -> jax.stages.Lowered:
    """Return a form before compilation."""
    model = nfnet_jax.create(self.group.model, **options_of(form)[0])

    def predict(params, state, images):
      images = inputs.normalize_images(images).astype(self._dtype)
      return model.apply(params, state, None, images, False)[0]

    return jax.jit(predict).lower(
      jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, self._dtype), self._weights[0]
      ),
      self._weights[1],
      self._images,
    )

  def prepare(self, forms: Iterable[str]) -> None:
    """Put weights and images on the device."""
    params, state = (make_params(shapes) for shapes in self._weights)
    params = jax.tree.map(lambda x: jnp.asarray(x, self._dtype), params)
    self._args = jax.device_put((params, state, self._images))

  def reset(self) -> None:
    """Do nothing: inference has no state."""

  def run(self, form: str, program: jax.stages.Compiled, steps: int) -> float:
    """Return seconds per call."""
    jax.block_until_ready(self._args)
    start = time.perf_counter()
    logits = [program(*self._args) for _ in range(steps)]
    jax.block_until_ready(logits)
    return (time.perf_counter() - start) / steps


def memory(program: jax.stages.Compiled) -> int:
  """Return the bytes of a program's arguments, results and temporaries."""
  sizes = program.memory_analysis()
  return (
    sizes.argument_size_in_bytes
    + sizes.output_size_in_bytes
    - sizes.alias_size_in_bytes
    + sizes.temp_size_in_bytes
  )


@functools.cache
def count_macs(model: str, pixels: int) -> int:
  """Count the multiply-adds of an image in the plain network."""
  weights = weight_shapes(model, pixels)
  return complexity.count_image_macs(nfnet_jax.create(model), *weights, pixels)


@functools.cache
def weight_shapes(model: str, pixels: int) -> tuple[dict, dict]:
  """Return the shapes of a network's parameters and of its state."""
  network = nfnet_jax.create(model)
  images = jnp.zeros((1, pixels, pixels, 3))
  init = lambda key: network.init(key, images, False)
  return jax.eval_shape(init, jax.random.key(0))


def make_params(shapes: dict) -> dict:
  """Fill parameters, or a state, on the host.

  On a GPU, compiling `init` takes long.
  """
  rng = np.random.default_rng(0)
  constants = {'gain': 1, 'scale': 1, 'skip_gain': 0.1, 'average': 1}

  def fill(path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    name = path.rpartition('/')[2]
    if name == 'w':
      scale = np.float32(math.prod(leaf.shape[:-1]) ** -0.5)
      return rng.standard_normal(leaf.shape, np.float32) * scale
    return np.full(leaf.shape, constants.get(name, 0), leaf.dtype)

  return trees.map_named(fill, shapes)
