"""Diagnosis of a step that is not finite: find the first bad tensor."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nfnet_jax import trees
from nfnet_jax.models import inputs
from nfnet_jax.training import data_parallel, layouts, sam
from nfnet_jax.training import state as state_lib
from nfnet_jax.training import step as step_lib

_ADVICE = (
  'The last good state is saved. Check the images; or start in a new workdir '
  'with a lower learning rate, a lower clipping threshold'
)
_MORE_ADVICE = ' or a longer warm-up.'
_MORE_ADVICE_WITH_SAM = ', a longer warm-up or a smaller optimizer.sam_rho.'


class NonFiniteError(ArithmeticError):
  """The loss, gradient or learning rate of a step was not finite.

  Attributes:
    step: 0-based index of the step.
    tensors: names of the tensors that were not finite, in the order of
      computation.
  """

  def __init__(self, step: int, tensors: list[str], with_sam: bool = False):
    self.step = step
    self.tensors = tensors
    first = f"first in '{tensors[0]}'" if tensors else 'not on replay'
    others = f' ({len(tensors) - 1} more tensors)' if len(tensors) > 1 else ''
    advice = _ADVICE + (_MORE_ADVICE_WITH_SAM if with_sam else _MORE_ADVICE)
    super().__init__(f'Step {step} is not finite: {first}{others}. {advice}')


def diagnose(
  trainer: step_lib.Trainer,
  parallel: data_parallel.DataParallel,
  state: state_lib.TrainState,
  batch: Mapping[str, np.ndarray],
) -> NonFiniteError:
  """Replay a step and check all its tensors in the order of computation.

  Args:
    trainer: the training step.
    parallel: devices that it ran on.
    state: whole state before the step, on every device.
    batch: this process's part of the step's batch.

  Returns:
    The error to raise.
  """
  trainer = dataclasses.replace(trainer, layout=layouts.REPLICATED)

  def count_bad(params, model_state, batch):
    replayed = state._replace(params=params, model_state=model_state)
    tensors = _tensors(trainer, replayed, batch)
    return trainer.layout.sum(
      collections.OrderedDict(
        (name, jnp.sum(~jnp.isfinite(value))) for name, value in tensors
      )
    )

  replay = parallel.eval_step(count_bad)
  counts = replay(state.params, state.model_state, parallel.shard_batch(batch))
  bad = [name for name, count in jax.device_get(counts).items() if count]
  return NonFiniteError(int(state.step), bad, bool(trainer.sam_rho))


def _tensors(
  trainer: step_lib.Trainer,
  state: state_lib.TrainState,
  batch: step_lib.Batch,
) -> Iterator[tuple[str, jax.Array]]:
  """Yield `(name, tensor)` of a step, in the order of computation."""
  order = _creation_order(trainer, batch)
  yield from _in_order(state.params, order)
  yield 'images', batch['image']
  if trainer.sam_rho:
    alone = dataclasses.replace(trainer, layout=layouts.Layout(axis=None))
    some = sam.sub_batch(batch, trainer.sam_share)
    for name, value in _pass(alone, state.params, state, some, order):
      yield f'{name} (SAM ascent)', value
  params = trainer.perturb(state, batch)
  suffix = ' (SAM descent)' if trainer.sam_rho else ''
  for name, value in _pass(trainer, params, state, batch, order):
    yield name + suffix, value
  yield 'learning rate', trainer.schedule(state.step)


def _pass(
  trainer: step_lib.Trainer,
  params: Any,
  state: state_lib.TrainState,
  batch: step_lib.Batch,
  order: list[str],
) -> Iterator[tuple[str, jax.Array]]:
  """Yield `(name, tensor)` of one forward and backward pass."""
  weights, sum_gradient = trainer.layout.gather(params, trainer.compute_dtype)
  outputs, _ = trainer.model.endpoints(
    weights, *trainer.model_inputs(state, batch)
  )
  for name, value in outputs.items():
    # Blocks return statistics; the variance is finite if the output is.
    yield name, value['var'] if isinstance(value, dict) else value
  (loss, _), grads = trainer.gradients(weights, state, batch)
  yield 'loss', trainer.layout.sum(loss)
  grads = sum_gradient(grads)
  # The backward pass computes the gradients of the last layer first.
  for path, grad in reversed(_in_order(grads, order)):
    yield f'gradient of {path}', grad
  # Squares overflow before gradients do.
  yield 'gradient norm', optax.tree.norm(grads)


def _in_order(tree: Any, order: list[str]) -> list[tuple[str, jax.Array]]:
  return sorted(
    trees.named_leaves(tree), key=lambda named: order.index(named[0])
  )


def _creation_order(
  trainer: step_lib.Trainer, batch: step_lib.Batch
) -> list[str]:
  """List parameter paths in the order in which the model creates them."""
  order: list[str] = []

  def init(key: jax.Array, images: jax.Array) -> None:
    # Haiku's tree keeps the order of creation; JAX sorts the trees it returns.
    params, _ = trainer.model.init(key, images, False)
    order.extend(
      f'{module}/{name}' for module in params for name in params[module]
    )

  jax.eval_shape(
    init, jax.random.key(0), inputs.normalize_images(batch['image'])
  )
  return order
