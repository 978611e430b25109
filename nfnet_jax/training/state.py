"""The state that a training step updates and that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nfnet_jax.models import registry

Tree = Any


class TrainState(NamedTuple):
  """The whole state of a run; randomness is derived from the seed and `step`.

  Attributes:
    step: int32 scalar, the number of updates made, which is the index of the
      next step.
    params: float32 tree under the published paths.
    model_state: running statistics; empty for normalizer-free models.
    opt_state: state of the optax chain.
    ema_params: EMA of `params`.
    ema_model_state: EMA of `model_state`.
  """

  step: jax.Array
  params: Tree
  model_state: Tree
  opt_state: Tree
  ema_params: Tree
  ema_model_state: Tree


def create_state(
  model: registry.Model,
  optimizer: optax.GradientTransformation,
  *,
  seed: int,
  image_size: int,
) -> TrainState:
  """Initialise the state of a run; EMAs start as copies of their values."""
  # It runs once, so on a CPU it is compiled without optimisation, which takes a
  # third of the time for NFNet-nano.
  on_cpu = jax.default_backend() == 'cpu'
  # JAX takes integers too, though it declares only strings and booleans.
  compiler_options: Any = (
    {'xla_backend_optimization_level': 0} if on_cpu else None
  )
  init = jax.jit(_initializer(model, optimizer, image_size))
  key = jax.random.key(seed)
  return init.lower(key).compile(compiler_options)(key)


def abstract_state(
  model: registry.Model,
  optimizer: optax.GradientTransformation,
  image_size: int,
) -> TrainState:
  """Return the state's shapes and dtypes without computing anything."""
  init = _initializer(model, optimizer, image_size)
  return jax.eval_shape(init, jax.random.key(0))


def _initializer(
  model: registry.Model,
  optimizer: optax.GradientTransformation,
  image_size: int,
) -> Callable[[jax.Array], TrainState]:
  def init(key: jax.Array) -> TrainState:
    images = jnp.zeros((1, image_size, image_size, 3))
    params, model_state = model.init(key, images, False)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      model_state=model_state,
      opt_state=optimizer.init(params),
      ema_params=params,
      ema_model_state=model_state,
    )

  return init
