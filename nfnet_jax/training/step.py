"""One training step, as a pure function.

It is the same for any number of devices; `layouts` says how parameters lie on
them.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from nfnet_jax.models import inputs, layers, registry
from nfnet_jax.optim import agc, ema
from nfnet_jax.training import layouts, sam
from nfnet_jax.training import state as state_lib

Batch = Mapping[str, jax.Array]
Tree = Any
# ((loss, (top1, model_state)), gradient) of a device's examples.
Gradients = tuple[tuple[jax.Array, tuple[jax.Array, Tree]], Tree]


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
    layout: how the state lies on the devices.
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
  layout: layouts.Layout = layouts.REPLICATED

  def train_step(
    self, state: state_lib.TrainState, batch: Batch
  ) -> tuple[state_lib.TrainState, dict[str, jax.Array]]:
    """Return the state after one step: gradients, reduction, update, selection.

    Args:
      state: the run's state as it lies on this device.
      batch: this device's examples: `image [n, H, W, 3]` in 0..255, or the
        result of `stem.to_blocks` for a model with a fast stem, `label [n, K]`,
        `weight [n, K]`, `position [n]` in the global batch, and the scalar
        `step` that the batch was made for.

    Returns:
      The new state, and metrics of the global batch. With SAM, loss, top-1 and
      gradient are those at the perturbed weights. If loss, gradient or learning
      rate is not finite, the old state is returned and `applied` is 0, on all
      devices. The following batches are then not applied either, as they were
      made for later steps: the state stays until the host reads `applied`.
    """
    weights, sum_gradient = self.layout.gather(
      self.perturb(state, batch), self.compute_dtype
    )
    (loss, (top1, model_state)), grads = self.gradients(weights, state, batch)

    loss, top1 = self.layout.sum((loss, top1))
    grads = sum_gradient(grads)
    model_state = self.layout.mean(model_state)

    new_state = self.update(state, grads, model_state)

    grad_norm = self.layout.norm(grads)
    learning_rate = self.schedule(state.step)
    is_finite = jnp.isfinite(jnp.stack([loss, grad_norm, learning_rate])).all()
    applied = is_finite & (batch['step'] == state.step)
    return select_tree(applied, state, new_state), {
      'loss': loss,
      'top1': top1,
      'learning_rate': learning_rate,
      'grad_norm': grad_norm,
      'applied': applied.astype(jnp.float32),
      **clipping_metrics(new_state.opt_state),
    }

  @jax.named_scope('update')
  def update(
    self, state: state_lib.TrainState, grads: Tree, model_state: Tree
  ) -> state_lib.TrainState:
    """Return the state after an update by gradients of the global mean loss."""
    optimizer = optax.with_extra_args_support(self.optimizer)
    updates, opt_state = optimizer.update(
      grads, state.opt_state, state.params, sum_units=self.layout.sum_units
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

  def perturb(self, state: state_lib.TrainState, batch: Batch) -> Tree:
    """Return the parameters, perturbed if SAM is used.

    Each device computes its own perturbation, without a reduction, so that with
    SAM a step depends on the number of devices. Examples draw the same random
    numbers in both passes. The perturbation uses neither weight decay nor
    clipping.
    """
    if not self.sam_rho:
      return state.params
    weights = layouts.cast(state.params, self.compute_dtype)
    some = sam.sub_batch(batch, self.sam_share)
    _, grads = self.gradients(weights, state, some)
    return sam.ascend(state.params, grads, self.sam_rho)

  def gradients(
    self, weights: Tree, state: state_lib.TrainState, batch: Batch
  ) -> Gradients:
    """Differentiate this device's share of the global mean loss.

    The examples are split into `accumulate` microbatches, or into fewer if the
    number of SAM's examples is not a multiple of it.

    Args:
      weights: what the model is applied to; see `layouts.Layout.gather`.
      state: state before the step.
      batch: see `train_step`.

    Returns:
      `((loss, (top1, model_state)), grads)`. Loss and top-1 are this device's
      terms of the global means; gradients are float32.
    """
    microbatches = math.gcd(self.accumulate, len(batch['label']))
    if microbatches == 1:
      return self._gradients(weights, state, batch)
    examples = {
      name: value.reshape(microbatches, -1, *value.shape[1:])
      for name, value in batch.items()
      if value.ndim
    }
    compute = lambda each: self._gradients(weights, state, {**batch, **each})
    first = jax.tree.map(lambda value: value[0], examples)
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, first)
    )
    add = lambda sums, each: (optax.tree.add(sums, compute(each)), None)
    return lax.scan(add, zeros, examples)[0]

  def _gradients(
    self, weights: Tree, state: state_lib.TrainState, batch: Batch
  ) -> Gradients:
    # Models that other code registers need not have this option.
    options = {'remat': True} if self.remat else {}

    def loss_fn(weights):
      with layers.kernels_are_standardized(self.layout.standardized):
        logits, model_state = self.model.apply(
          weights, *self.model_inputs(state, batch), **options
        )
      logits = logits.astype(jnp.float32)
      labels = batch['label'], batch['weight']
      targets = smooth_labels(*labels, self.num_classes, self.label_smoothing)
      losses = optax.softmax_cross_entropy(logits, targets)
      hits = jnp.argmax(logits, axis=-1) == main_label(*labels)
      share = 1 / self.global_batch
      return jnp.sum(losses) * share, (jnp.sum(hits) * share, model_state)

    results, grads = jax.value_and_grad(loss_fn, has_aux=True)(weights)
    return results, optax.tree.cast(grads, jnp.float32)

  def model_inputs(
    self, state: state_lib.TrainState, batch: Batch
  ) -> tuple[Any, ...]:
    """Return the arguments of the model's `apply` that follow the weights."""
    images = inputs.normalize_images(batch['image'])
    return (
      state.model_state,
      jax.random.fold_in(jax.random.key(self.seed), state.step),
      layouts.cast(images, self.compute_dtype),
      True,
      batch['position'],
    )

  def _update_ema(self, average: Tree, values: Tree, step: jax.Array) -> Tree:
    return ema.update_ema(average, values, self.ema_decay, step)


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
