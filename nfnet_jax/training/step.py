"""One training step, as a pure function.

It does not know how many devices there are: `reduce` sums a tree over all of
them, and is the identity on one.
"""

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
  """Maps weighted labels to smoothed distributions `[N, num_classes]`.

  Args:
    labels: classes of each example, `[N, K]`; K is 2 for mixed images.
    weights: their shares, `[N, K]`. A row of zeros gives a target of zeros,
      which has no loss and no gradient.
    num_classes: size of the distribution.
    smoothing: share that is spread over all classes.
  """
  one_hot = jax.nn.one_hot(labels, num_classes)
  smoothed = one_hot * (1 - smoothing) + smoothing / num_classes
  return jnp.sum(smoothed * weights[..., None], axis=1)


def main_label(labels: jax.Array, weights: jax.Array) -> jax.Array:
  """Returns the label `[N]` of greatest weight, of those `[N, K]`.

  It is -1 where all weights are 0.
  """
  heaviest = jnp.argmax(weights, axis=1)[:, None]
  chosen = jnp.take_along_axis(labels, heaviest, axis=1)[:, 0]
  return jnp.where(jnp.any(weights > 0, axis=1), chosen, -1)


@dataclasses.dataclass(frozen=True)
class Trainer:
  """Everything fixed about a training step.

  Attributes:
    model: the network.
    optimizer: the optax chain; see `optim.recipe`.
    schedule: the chain's learning rate, for the log.
    num_classes: size of the logits.
    global_batch: examples a step over all devices.
    seed: root of the step's randomness.
    label_smoothing: share of the target spread over all classes.
    ema_decay: limit of the average's decay.
    compute_dtype: dtype of the forward and backward pass; parameters,
      gradient sums and updates are float32.
    sam_rho: length of SAM's way uphill (see `training.sam`); 0 for none.
    sam_share: share of a device's examples that SAM climbs by, in (0, 1].
    remat: whether the backward pass computes the blocks again, for memory.
    accumulate: parts, one after the other, in which a device takes the gradient
      of its examples; for models without batch statistics.
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

  # All devices hold the same; see `parallel.DataParallel.train_step`.
  axes = None

  def train_step(
    self, state: state_lib.TrainState, batch: Batch, reduce: Reduce
  ) -> tuple[state_lib.TrainState, dict[str, jax.Array]]:
    """Makes one update: gradients, reduction, update.

    Args:
      state: the run's state, the same on every device.
      batch: this device's examples: `image [n, H, W, 3]` in 0..255, or for a
        model with a fast stem `fast_stem.to_blocks` of that,
        `label [n, K]` and `weight [n, K]`, `position [n]` in the global batch,
        and the scalar `step` that the batch was made for.
      reduce: sums a tree over the devices.

    Returns:
      The new state, and metrics of the global batch; with SAM, loss, top-1 and
      gradient are those at the weights uphill. Where loss, gradient or learning
      rate is not finite, or any device's batch is of another step than the
      state, the state is returned as it was and `applied` is 0, on all devices:
      after a bad step all later ones leave the state alone too, until the host
      looks.
    """
    perturbed_state = self.perturbed_state(state, batch)
    (loss, (top1, model_state)), grads = self.gradients(perturbed_state, batch)

    batch_mismatch = self.batch_mismatch(state, batch)
    loss, top1, batch_mismatch, grads = reduce(
      (loss, top1, batch_mismatch, grads)
    )
    model_state = self.mean(model_state, reduce)
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
    """Returns the state after an update by gradients of the global mean."""
    updates, opt_state = self.optimizer.update(
      grads, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    return state_lib.TrainState(
      step=state.step + 1,
      params=params,
      model_state=model_state,
      opt_state=opt_state,
      ema_params=self._average(state.ema_params, params, state.step),
      ema_model_state=self._average(
        state.ema_model_state, model_state, state.step
      ),
    )

  def batch_mismatch(
    self, state: state_lib.TrainState, batch: Batch
  ) -> jax.Array:
    """Returns 1 where this device's batch is not for this step, else 0."""
    return (batch['step'] != state.step).astype(jnp.float32)

  def is_applicable(
    self,
    step: jax.Array,
    batch_mismatch: jax.Array,
    loss: jax.Array,
    grad_norm: jax.Array,
  ) -> jax.Array:
    """Whether a step may be applied: finite, and of batches made for it.

    Args:
      step: index of the update.
      strays: how many devices' batches were not; like the others, reduced, so
        that all devices answer alike.
      loss: of the global batch.
      grad_norm: of the global gradient.
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
    """Returns what the log tells of the step after `state`."""
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
    """Returns the state to descend from: with SAM, of other parameters.

    They are this device's own, never reduced, so that with SAM a step depends
    on the number of devices. Examples draw the same random numbers in both
    passes. Neither weight decay nor clipping takes part.
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
  ):
    """Differentiates this device's share of the global mean loss.

    In `accumulate` parts; in fewer, if SAM's examples do not divide by it.

    Args:
      state: whose parameters, of any dtype, are differentiated by.
      batch: see `train_step`.
      apply: takes the place of the model's.

    Returns:
      `((loss, (top1, model_state)), grads)`. Loss and top-1 are this device's
      terms of the global means; gradients are float32.
    """
    parts = math.gcd(self.accumulate, len(batch['label']))
    apply = apply or self.model.apply
    if parts == 1:
      return self._gradients(state, batch, apply)
    examples = {
      name: value.reshape(parts, -1, *value.shape[1:])
      for name, value in batch.items()
      if value.ndim
    }
    compute = lambda part: self._gradients(state, {**batch, **part}, apply)
    first = jax.tree.map(lambda value: value[0], examples)
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, first)
    )
    add = lambda sums, part: (optax.tree.add(sums, compute(part)), None)
    return lax.scan(add, zeros, examples)[0]

  def _gradients(
    self, state: state_lib.TrainState, batch: Batch, apply: Callable
  ):
    # A model of one's own need not know of it.
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
  ):
    """Returns what the model is applied to in training, in compute dtype."""
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
    """Brings a tree to the dtype of the computation."""
    return jax.tree.map(lambda x: x.astype(self.compute_dtype), tree)

  def _average(self, average: Tree, values: Tree, step: jax.Array) -> Tree:
    return ema.update_ema(average, values, self.ema_decay, step)

  def mean(self, tree: Tree, reduce: Reduce) -> Tree:
    """Averages running statistics over all devices."""
    devices = reduce(jnp.ones(()))

    def divide(total: jax.Array) -> jax.Array:
      if jnp.issubdtype(total.dtype, jnp.integer):
        # A counter, the same on every device, stays an integer.
        return total // devices.astype(total.dtype)
      return total / devices

    return jax.tree.map(divide, reduce(tree))


@jax.named_scope('update')
def select_tree(applied: jax.Array, state: Tree, new_state: Tree) -> Tree:
  """Returns the new state where the step is applied, else the old one."""
  choose = lambda new, old: jnp.where(applied, new, old)
  return jax.tree.map(choose, new_state, state)


def clipping_metrics(opt_state: Tree) -> dict[str, jax.Array]:
  """Reads the clipped fractions out of an optimiser state, if it has AGC."""
  for node in agc.states(opt_state):
    groups = node.clipped_by_group.items()
    return {
      'clipped': node.clipped,
      **{f'clipped/{name}': share for name, share in groups},
    }
  return {}
