"""Evaluation: its step, and an exact pass over the data for several weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from nfnet_jax.models import inputs, registry
from nfnet_jax.storage import files
from nfnet_jax.training import data_parallel, layouts
from nfnet_jax.training import state as state_lib
from nfnet_jax.training import step as step_lib

# Prefixes of the metrics of raw weights and of EMA weights.
RAW, EMA = 'eval', 'eval_ema'
_LABELS = {RAW: 'raw weights', EMA: 'EMA weights'}
_JSON_PREFIXES = {RAW: '', EMA: 'ema_'}

# Prefix -> parameters and running statistics.
Weights = Mapping[str, tuple[Any, Any]]


def evaluator(model: registry.Model) -> Callable[..., dict[str, jax.Array]]:
  """Return an evaluation step `(params, model_state, batch) -> sums`.

  It computes in float32 and sums loss, top-1 hits, top-5 hits and `count` over
  the examples whose `mask` is 1, over all devices.
  """

  def eval_step(
    params: Any, model_state: Any, batch: step_lib.Batch
  ) -> dict[str, jax.Array]:
    images = inputs.normalize_images(batch['image'])
    logits, _ = model.apply(params, model_state, None, images, False)
    sums = classification_sums(logits, batch['label'], batch['mask'])
    return layouts.REPLICATED.sum(sums)

  return eval_step


def classification_sums(
  logits: jax.Array, labels: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
  """Sum loss, top-1 and top-5 hits over the examples whose mask is 1.

  `top_k` breaks ties by index, so that constant logits score at chance. A row
  with a NaN is a miss.
  """
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
  losses = -jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]
  _, ranked = lax.top_k(logits, min(5, logits.shape[-1]))
  hits = (ranked == labels[:, None]) & jnp.isfinite(losses)[:, None]
  keep = mask > 0
  return {
    'loss': jnp.sum(jnp.where(keep, losses, 0)),
    'top1': jnp.sum(jnp.where(keep, hits[:, 0], 0).astype(jnp.float32)),
    'top5': jnp.sum(
      jnp.where(keep, jnp.any(hits, axis=1), 0).astype(jnp.float32)
    ),
    'count': jnp.sum(mask.astype(jnp.float32)),
  }


def weights_of(state: state_lib.TrainState) -> Weights:
  """Return the raw and the EMA weights of a state."""
  return {
    RAW: (state.params, state.model_state),
    EMA: (state.ema_params, state.ema_model_state),
  }


def evaluate(
  eval_step: Callable,
  parallel: data_parallel.DataParallel,
  weights: Weights,
  batches: Iterable[Mapping[str, np.ndarray]],
  poll: Callable[[], None] = lambda: None,
) -> dict[str, float]:
  """Average loss, top-1 and top-5 over all examples, each counted once.

  Args:
    eval_step: `evaluator(model)`, compiled by `parallel.eval_step`.
    parallel: devices that it runs on.
    weights: replicated weights; see `weights_of`.
    batches: padded batches with a `mask`; see `data.pipeline.eval_batches`.
    poll: called before each batch; may raise to stop.

  Returns:
    For each prefix, such as 'eval': `eval/loss`, `eval/top1`, `eval/top5` and
    `eval/examples`; top-1 and top-5 are fractions.

  Raises:
    ValueError: if there are no examples.
  """
  totals: dict[str, list[Any]] = {name: [] for name in weights}
  for batch in batches:
    poll()
    placed = parallel.shard_batch(batch)
    for name, (params, model_state) in weights.items():
      totals[name].append(eval_step(params, model_state, placed))
    # Bounds the number of batches on the devices.
    jax.block_until_ready([sums[-3:-2] for sums in totals.values()])
  return {
    f'{name}/{metric}': value
    for name, sums in totals.items()
    for metric, value in _means(jax.device_get(sums)).items()
  }


def _means(sums: list[dict[str, np.ndarray]]) -> dict[str, float]:
  """Divide summed metrics by the number of examples, in float64."""
  total = {
    name: sum(float(batch[name]) for batch in sums)
    for name in ('loss', 'top1', 'top5', 'count')
  }
  count = total.pop('count')
  if not count:
    raise ValueError(
      'Evaluation saw no examples. Check that the split has any.'
    )
  means = {name: value / count for name, value in total.items()}
  return {**means, 'examples': int(count)}


def flat_names(results: Mapping[str, float]) -> dict[str, float]:
  """Return results by their names in JSON: `top1`, `ema_top1`, `examples`..."""
  return {
    'examples': results[f'{RAW}/examples'],
    **{
      f'{prefix}{name}': results[f'{kind}/{name}']
      for kind, prefix in _JSON_PREFIXES.items()
      if f'{kind}/examples' in results
      for name in ('loss', 'top1', 'top5')
    },
  }


def to_json(results: Mapping[str, float], **more: float) -> str:
  """Format results as one JSON object; a NaN becomes null."""
  return files.to_json({**more, **flat_names(results)})


def report(results: Mapping[str, float]) -> str:
  """Format results as text, one line per set of weights."""
  kinds = [kind for kind in _LABELS if f'{kind}/examples' in results]
  return '\n'.join(
    f'{_LABELS[kind] if len(kinds) > 1 else "weights"}: top-1 '
    f'{100 * results[f"{kind}/top1"]:.2f} %, top-5 '
    f'{100 * results[f"{kind}/top5"]:.2f} %, loss '
    f'{results[f"{kind}/loss"]:.4f} on {results[f"{kind}/examples"]:,} images'
    for kind in kinds
  )
