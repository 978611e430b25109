"""Steps and evaluations with extreme data: results are finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nfnet_jax
from nfnet_jax.training import data_parallel, evaluation, state, step
from tests.training import small_models
from tests.training.batches import random_batch

SIZE, BATCH = 16, 8  # One image per device.


def make_batches(classes):
  """Return batches that are extreme in one way each."""
  batch = random_batch(0, count=BATCH, size=SIZE, classes=classes)
  return {
    'random': batch,
    'black': batch | {'image': np.zeros_like(batch['image'])},
    'white': batch | {'image': np.full_like(batch['image'], 255)},
    'one label': batch | {'label': np.zeros_like(batch['label'])},
  }


@pytest.mark.parametrize('classes', [1, 10_000])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_results_are_finite(classes, dtype):
  trainer = step.Trainer(
    model=small_models.residual(classes),
    optimizer=nfnet_jax.make_optimizer(0.1),
    schedule=lambda _: 0.1,
    num_classes=classes,
    global_batch=BATCH,
    compute_dtype=dtype,
  )
  parallel = data_parallel.DataParallel()
  train_state = parallel.shard_state(
    trainer.layout,
    state.create_state(
      trainer.model, trainer.optimizer, seed=0, image_size=SIZE
    ),
  )
  train_step = parallel.train_step(trainer)
  eval_step = parallel.eval_step(evaluation.evaluator(trainer.model))
  index = 0
  for kind, batch in make_batches(classes).items():
    for _ in range(3):
      placed = parallel.shard_batch(batch | {'step': np.int32(index)})
      train_state, metrics = train_step(train_state, placed)
      index += 1
    metrics = jax.device_get(metrics)
    assert metrics['applied'], kind
    assert all(np.all(np.isfinite(v)) for v in metrics.values()), kind
    results = evaluation.evaluate(
      eval_step,
      parallel,
      evaluation.weights_of(parallel.gather_state(trainer.layout)(train_state)),
      [
        {
          'image': batch['image'],
          'label': batch['label'][:, 0],
          'mask': np.ones(BATCH, np.float32),
        }
      ],
    )
    assert np.all(np.isfinite(list(results.values()))), kind
    if classes == 1:
      assert results['eval/top1'] == results['eval/top5'] == 1
      assert results['eval/loss'] == 0
