"""One training step, as a pure function.

It is independent of the number of devices: `reduce` sums a tree over all of
them and is the identity on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from nfnet_jax.models import inputs, registry
from nfnet_jax.optim import agc, ema
from nfnet_jax.training import sam
from nfnet_jax.training import state as state_lib

Batch = Mapping[str, jax.Array]
Tree = Any
Reduce = Callable[[Tree], Tree]


def smooth_labels(
  labels: jax.Array, weights: jax.Array, num_classes: int, smoothing: float
) -> jax.Array:
  """Return the smoothed target distributions `[N, num_classes]` of labels.

  Args:
    labels: classes of each example, `[N, K]`; K is 2 for mixed images.
    weights: weights of these labels, `[N, K]`. A row of zeros gives a target of
      zeros, which has no loss and no gradient.
    num_classes: size of the distribution.
    smoothing: share of the target that is spread over all classes.
  """
  one_hot = jax.nn.one_hot(labels, num_classes)
  smoothed = one_hot * (1 - smoothing) + smoothing / num_classes
  return jnp.sum(smoothed * weights[..., None], axis=1)


def main_label(labels: jax.Array, weights: jax.Array) -> jax.Array:
  """Return each example's label with the largest weight, `[N]` of `[N, K]`.

  It is -1 where all weights are 0.
  """
  heaviest = jnp.argmax(weights, axis=1)[:, None]
  chosen = jnp.take_along_axis(labels, heaviest, axis=1)[:, 0]
  return jnp.where(jnp.any(weights > 0, axis=1), chosen, -1)


@dataclasses.dataclass(frozen=True)
class Trainer:
  """A training step, with all that stays fixed during a run.

  Attributes:
    model: the network.
    optimizer: the optax chain; see `optim.recipe`.
    schedule: learning rate of that chain, for the log.
    num_classes: size of the logits.
    global_batch: examples per step over all devices.
    seed: root of the step's randomness.
    label_smoothing: share of the target that is spread over all classes.
    ema_decay: limit of the EMA's decay.
    compute_dtype: dtype of the forward and backward pass; parameters, gradient
      sums and updates are float32.
    sam_rho: norm of SAM's perturbation (see `training.sam`); 0 for no SAM.
    sam_share: share of a device's examples that the perturbation is computed
      from, in (0, 1].
    remat: whether the backward pass recomputes the blocks to save memory.
    accumulate: number of microbatches per device whose gradients are summed one
      after the other; for models without batch statistics.
  """

  model: registry.Model
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  num_classes: int
  global_batch: int
  seed: int = 0
  label_smoothing: float = 0.1
  ema_decay: float = 0.99999
  compute_dtype: jnp.dtype = jnp.float32
  sam_rho: float = 0.0
  sam_share: float = 0.2
  remat: bool = False
  accumulate: int = 1

  # All devices hold the same state; see `data_parallel.DataParallel`.
  state_axes = None

  def train_step(
    self, state: state_lib.TrainState, batch: Batch, reduce: Reduce
  ) -> tuple[state_lib.TrainState, dict[str, jax.Array]]:
    """Return the state after one update: gradients, reduction, update.

    Args:
      state: the run's state, the same on every device.
      batch: this device's examples: `image [n, H, W, 3]` in 0..255, or the
        result of `stem.to_blocks` for a model with a fast stem, `label [n, K]`,
        `weight [n, K]`, `position [n]` in the global batch, and the scalar
        `step` that the batch was made for.
      reduce: sums a tree over the devices.

    Returns:
      The new state, and metrics of the global batch. With SAM, loss, top-1 and
      gradient are those at the perturbed weights. If loss, gradient or learning
      rate is not finite, or any device's batch was made for another step, the
      old state is returned and `applied` is 0, on all devices. Then the later
      batches do not match the state either, so it stays unchanged until the
      host reads `applied`.
    """
    perturbed = self.perturbed_state(state, batch)
    (loss, (top1, model_state)), grads = self.gradients(perturbed, batch)

    batch_mismatch = self.batch_mismatch(state, batch)
    loss, top1, batch_mismatch, grads = reduce(
      (loss, top1, batch_mismatch, grads)
    )
    model_state = self.average_statistics(model_state, reduce)
    grad_norm = optax.tree.norm(grads)
    applied = self.is_applicable(state.step, batch_mismatch, loss, grad_norm)
    new_state = self.update(state, grads, model_state)
    return select_tree(applied, state, new_state), {
      **self.metrics(state, loss, top1, grad_norm, applied),
      **clipping_metrics(new_state.opt_state),
    }

  @jax.named_scope('update')
  def update(
    self, state: state_lib.TrainState, grads: Tree, model_state: Tree
  ) -> state_lib.TrainState:
    """Return the state after an update by gradients of the global mean loss."""
    updates, opt_state = self.optimizer.update(
      grads, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    return state_lib.TrainState(
      step=state.step + 1,
      params=params,
      model_state=model_state,
      opt_state=opt_state,
      ema_params=self._update_ema(state.ema_params, params, state.step),
      ema_model_state=self._update_ema(
        state.ema_model_state, model_state, state.step
      ),
    )

  def batch_mismatch(
    self, state: state_lib.TrainState, batch: Batch
  ) -> jax.Array:
    """Return 1 if this device's batch was not made for this step, else 0."""
    return (batch['step'] != state.step).astype(jnp.float32)

  def is_applicable(
    self,
    step: jax.Array,
    batch_mismatch: jax.Array,
    loss: jax.Array,
    grad_norm: jax.Array,
  ) -> jax.Array:
    """Return whether a step may be applied: finite, and with matching batches.

    All values are reduced ones, so that all devices return the same.

    Args:
      step: index of the update.
      batch_mismatch: number of devices whose batch was made for another step.
      loss: loss of the global batch.
      grad_norm: norm of the global gradient.
    """
    needed = jnp.stack([loss, grad_norm, self.schedule(step)])
    return jnp.isfinite(needed).all() & (batch_mismatch == 0)

  def metrics(
    self,
    state: state_lib.TrainState,
    loss: jax.Array,
    top1: jax.Array,
    grad_norm: jax.Array,
    applied: jax.Array,
  ) -> dict[str, jax.Array]:
    """Return the logged metrics of the step that starts from `state`."""
    return {
      'loss': loss,
      'top1': top1,
      'learning_rate': self.schedule(state.step),
      'grad_norm': grad_norm,
      'applied': applied.astype(jnp.float32),
    }

  def perturbed_state(
    self, state: state_lib.TrainState, batch: Batch
  ) -> state_lib.TrainState:
    """Return the state, with perturbed parameters if SAM is used.

    Each device computes its own perturbation, without a reduction, so that with
    SAM a step depends on the number of devices. Examples draw the same random
    numbers in both passes. The perturbation uses neither weight decay nor
    clipping.
    """
    if not self.sam_rho:
      return state
    _, grads = self.gradients(state, sam.sub_batch(batch, self.sam_share))
    return state._replace(params=sam.ascend(state.params, grads, self.sam_rho))

  def gradients(
    self,
    state: state_lib.TrainState,
    batch: Batch,
    apply: Callable | None = None,
  ) -> tuple[tuple[jax.Array, tuple[jax.Array, Tree]], Tree]:
    """Differentiate this device's share of the global mean loss.

    The examples are split into `accumulate` microbatches, or into fewer if the
    number of SAM's examples is not a multiple of it.

    Args:
      state: state with the parameters, of any dtype, to differentiate by.
      batch: see `train_step`.
      apply: replaces the model's `apply`.

    Returns:
      `((loss, (top1, model_state)), grads)`. Loss and top-1 are this device's
      terms of the global means; gradients are float32.
    """
    microbatches = math.gcd(self.accumulate, len(batch['label']))
    apply = apply or self.model.apply
    if microbatches == 1:
      return self._gradients(state, batch, apply)
    examples = {
      name: value.reshape(microbatches, -1, *value.shape[1:])
      for name, value in batch.items()
      if value.ndim
    }
    compute = lambda each: self._gradients(state, {**batch, **each}, apply)
    first = jax.tree.map(lambda value: value[0], examples)
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, first)
    )
    add = lambda sums, each: (optax.tree.add(sums, compute(each)), None)
    return lax.scan(add, zeros, examples)[0]

  def _gradients(
    self, state: state_lib.TrainState, batch: Batch, apply: Callable
  ) -> tuple[tuple[jax.Array, tuple[jax.Array, Tree]], Tree]:
    # Models that other code registers need not have this option.
    options = {'remat': True} if self.remat else {}

    def loss_fn(params):
      logits, model_state = apply(
        *self.model_inputs(params, state, batch), **options
      )
      logits = logits.astype(jnp.float32)
      labels, weights = batch['label'], batch['weight']
      targets = smooth_labels(
        labels, weights, self.num_classes, self.label_smoothing
      )
      losses = optax.softmax_cross_entropy(logits, targets)
      hits = jnp.argmax(logits, axis=-1) == main_label(labels, weights)
      share = 1 / self.global_batch
      return jnp.sum(losses) * share, (jnp.sum(hits) * share, model_state)

    results, grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return results, optax.tree.cast(grads, jnp.float32)

  def model_inputs(
    self, params: Tree, state: state_lib.TrainState, batch: Batch
  ) -> tuple[Any, ...]:
    """Return the arguments of the model's `apply` in training."""
    return (
      self.cast(params),
      state.model_state,
      jax.random.fold_in(jax.random.key(self.seed), state.step),
      self.cast(inputs.normalize_images(batch['image'])),
      True,
      batch['position'],
    )

  @jax.named_scope('cast')
  def cast(self, tree: Tree) -> Tree:
    """Cast a tree to `compute_dtype`."""
    return jax.tree.map(lambda x: x.astype(self.compute_dtype), tree)

  def _update_ema(self, average: Tree, values: Tree, step: jax.Array) -> Tree:
    return ema.update_ema(average, values, self.ema_decay, step)

  def average_statistics(self, tree: Tree, reduce: Reduce) -> Tree:
    """Average running statistics over all devices."""
    devices = reduce(jnp.ones(()))

    def divide(total: jax.Array) -> jax.Array:
      if jnp.issubdtype(total.dtype, jnp.integer):
        # A counter is the same on every device and stays an integer.
        return total // devices.astype(total.dtype)
      return total / devices

    return jax.tree.map(divide, reduce(tree))


@jax.named_scope('update')
def select_tree(applied: jax.Array, state: Tree, new_state: Tree) -> Tree:
  """Return the new state if the step is applied, else the old one."""
  choose = lambda new, old: jnp.where(applied, new, old)
  return jax.tree.map(choose, new_state, state)


def clipping_metrics(opt_state: Tree) -> dict[str, jax.Array]:
  """Return the clipped fractions of an optimiser state, if it has AGC."""
  for node in agc.states(opt_state):
    groups = node.clipped_by_group.items()
    return {
      'clipped': node.clipped,
      **{f'clipped/{name}': share for name, share in groups},
    }
  return {}
