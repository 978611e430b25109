"""The step on one and on eight devices, its dtypes, and refused batches.

`python -m tests.training.test_step` regenerates the golden losses.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nfnet_jax
from nfnet_jax import trees
from nfnet_jax.models import inputs
from nfnet_jax.models.fast import stem
from nfnet_jax.optim import ema
from nfnet_jax.training import data_parallel, layouts, state, step
from tests.training import linear_runs
from tests.training.batches import random_batch

GOLDEN_LOSSES = pathlib.Path(__file__).parents[1] / 'golden' / 'losses.json'
BATCH = 16
SIZE = 32


def make_trainer(**changes):
  schedule = nfnet_jax.warmup_cosine(0.4, warmup_steps=3, total_steps=10)
  trainer = step.Trainer(
    model=nfnet_jax.create('nfnet_pico', num_classes=10),
    optimizer=nfnet_jax.make_optimizer(schedule),
    schedule=schedule,
    num_classes=10,
    global_batch=BATCH,
    seed=7,
    ema_decay=0.9,
  )
  return dataclasses.replace(trainer, **changes)


def make_batch(index):
  return random_batch(index, count=BATCH, size=SIZE, classes=10)


class Runner:
  """A trainer compiled for some devices, with fresh states on demand.

  Compiled ahead of time: another shape would be an error, not a compilation.
  """

  def __init__(self, trainer, devices, batch=None):
    self.trainer = trainer
    self.parallel = data_parallel.DataParallel(jax.local_devices()[:devices])
    fresh = state.create_state(
      trainer.model, trainer.optimizer, seed=1, image_size=SIZE
    )
    # Skip gains are not zero, so that branches and random draws have an effect.
    self.initial = jax.device_get(
      fresh._replace(
        params=trees.map_named(
          lambda path, p: p + 0.5 if path.endswith('skip_gain') else p,
          fresh.params,
        )
      )
    )

    step = self.parallel.train_step(trainer)
    self.step = step.lower(
      self.fresh_state(), self.parallel.shard_batch(batch or make_batch(0))
    ).compile()

  def fresh_state(self):
    return self.parallel.replicate(self.initial)

  def run(self, train_state, batches):
    rows = []
    for batch in batches:
      train_state, metrics = self.step(
        train_state, self.parallel.shard_batch(batch)
      )
      rows.append(jax.device_get(metrics))
    return train_state, rows


@pytest.fixture(scope='module')
def eight():
  return Runner(make_trainer(), 8)


@pytest.fixture(scope='module')
def ten_steps(eight):
  final, rows = eight.run(eight.fresh_state(), map(make_batch, range(10)))
  return jax.device_get(final), rows


def test_one_and_eight_devices_train_a_layer_alike():
  """Check the same as the next test, on a network that compiles quickly."""
  losses = []
  for devices in (1, 8):
    first = linear_runs.make_batch(0)
    runner = Runner(linear_runs.make_trainer(), devices, first)
    batches = map(linear_runs.make_batch, range(10))
    _, rows = runner.run(runner.fresh_state(), batches)
    losses.append([row['loss'] for row in rows])
  np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.full
def test_one_and_eight_devices_give_the_same_losses(ten_steps):
  one = Runner(make_trainer(), 1)
  _, rows = one.run(one.fresh_state(), map(make_batch, range(10)))
  for ours, theirs in zip(rows, ten_steps[1], strict=True):
    np.testing.assert_allclose(ours['loss'], theirs['loss'], rtol=1e-5)


def test_ten_steps_give_the_committed_losses(ten_steps):
  """Pin the whole step; regenerate only if training is meant to change.

  Tolerance: the compiler of another version may round differently, and ten
  steps amplify that.
  """
  losses = [float(row['loss']) for row in ten_steps[1]]
  golden = json.loads(GOLDEN_LOSSES.read_text())
  np.testing.assert_allclose(losses, golden, rtol=1e-4)


def test_metrics_and_state_after_ten_steps(ten_steps):
  final, rows = ten_steps
  assert final.step == 10
  assert all(row['applied'] == 1 for row in rows)
  assert rows[0]['learning_rate'] == 0
  np.testing.assert_allclose(rows[3]['learning_rate'], 0.4, rtol=1e-6)
  assert {'clipped', 'clipped/kernels', 'clipped/gains and biases'} <= set(
    rows[0]
  )
  assert 0 < rows[-1]['clipped'] <= 1
  moved = jax.tree.map(
    lambda raw, mean: float(np.max(np.abs(raw - mean))),
    final.params,
    final.ema_params,
  )
  assert max(jax.tree.leaves(moved)) > 0


def test_averages_follow_the_new_parameters():
  """The first average keeps 1 / 10 of the initial value, or `ema_decay`."""
  trainer = dataclasses.replace(linear_runs.make_trainer(), ema_decay=0.9)
  first = linear_runs.make_batch(0)
  runner = Runner(trainer, 1, first)
  initial = runner.initial
  jax.tree.map(
    np.testing.assert_array_equal, initial.ema_params, initial.params
  )
  final, _ = runner.run(runner.fresh_state(), [first])
  decay = float(ema.ema_decay(0.9, jnp.zeros((), jnp.int32)))
  for new, old, mean in zip(
    *map(jax.tree.leaves, (final.params, initial.params, final.ema_params))
  ):
    assert not np.array_equal(new, old)
    np.testing.assert_allclose(
      mean, decay * old + (1 - decay) * new, rtol=1e-5, atol=1e-7
    )


def test_loss_of_bfloat16_logits_is_float32():
  trainer = dataclasses.replace(
    linear_runs.make_trainer(), compute_dtype=jnp.dtype('bfloat16')
  )
  initial = state.abstract_state(
    trainer.model, trainer.optimizer, linear_runs.SIZE
  )
  traced = jax.make_jaxpr(trainer.gradients)(
    layouts.cast(
      jax.tree.map(lambda x: jnp.zeros(x.shape), initial.params), jnp.bfloat16
    ),
    initial,
    linear_runs.make_batch(0),
  )
  logs = [e for e in _equations(traced.jaxpr) if e.primitive.name == 'log']
  assert logs
  assert all(e.outvars[0].aval.dtype == jnp.float32 for e in logs)


def make_blocks(index):
  batch = make_batch(index)
  return {**batch, 'image': np.asarray(stem.to_blocks(batch['image']))}


def make_fast_trainer(*fast_paths):
  options = dict.fromkeys(fast_paths, True)
  return make_trainer(model=nfnet_jax.create('nfnet_pico', 10, **options))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('fast_paths', 'make'),
  [
    (['fast_stem'], make_blocks),
    (['fused_blocks', 'fast_convs'], make_batch),
  ],
)
def test_fast_paths_train_alike(ten_steps, fast_paths, make):
  runner = Runner(make_fast_trainer(*fast_paths), 8, make(0))
  _, rows = runner.run(runner.fresh_state(), map(make, range(10)))
  losses = [[row['loss'] for row in each] for each in (rows, ten_steps[1])]
  np.testing.assert_allclose(*losses, rtol=1e-5)
  assert all(row['applied'] for row in rows)


def test_state_is_donated(eight):
  header = eight.step.as_text().splitlines()[0]
  donated = header.count('may-alias') + header.count('must-alias')
  assert donated == len(jax.tree.leaves(eight.initial))


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_bad_batch_leaves_the_state_unchanged(eight, value):
  bad = make_batch(0)
  bad['image'][3, 5, 5, 1] = value
  final, rows = eight.run(eight.fresh_state(), [bad, make_batch(1)])
  assert [row['applied'] for row in rows] == [0, 0]
  jax.tree.map(
    np.testing.assert_array_equal, jax.device_get(final), eight.initial
  )


def test_batch_of_another_step_is_refused(eight):
  final, rows = eight.run(eight.fresh_state(), [make_batch(5)])
  assert rows[0]['applied'] == 0
  assert int(final.step) == 0


def test_bfloat16_computes_low_and_keeps_high():
  trainer = make_trainer(compute_dtype=jnp.dtype('bfloat16'))
  initial = state.abstract_state(trainer.model, trainer.optimizer, SIZE)
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), make_batch(0)
  )
  alone = dataclasses.replace(trainer, layout=layouts.Layout(axis=None))
  final, metrics = jax.eval_shape(alone.train_step, initial, batch)
  weights = jax.eval_shape(
    lambda params: layouts.cast(params, trainer.compute_dtype), initial.params
  )
  _, grads = jax.eval_shape(trainer.gradients, weights, initial, batch)
  assert {g.dtype.name for g in jax.tree.leaves(grads)} == {'float32'}
  assert jax.tree.map(lambda x: x.dtype, final) == jax.tree.map(
    lambda x: x.dtype, initial
  )
  assert all(m.dtype == jnp.float32 for m in metrics.values())
  convolutions = [
    equation
    for equation in _equations(
      jax.make_jaxpr(alone.train_step)(initial, batch).jaxpr
    )
    if equation.primitive.name == 'conv_general_dilated'
  ]
  assert convolutions
  assert all(
    equation.outvars[0].aval.dtype == jnp.bfloat16 for equation in convolutions
  )


@pytest.mark.full
def test_bfloat16_trains_about_the_same(ten_steps):
  runner = Runner(make_trainer(compute_dtype=jnp.dtype('bfloat16')), 8)
  _, rows = runner.run(runner.fresh_state(), map(make_batch, range(4)))
  for ours, theirs in zip(rows, ten_steps[1]):
    assert ours['applied'] == 1
    np.testing.assert_allclose(ours['loss'], theirs['loss'], rtol=0.02)


def _equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from _equations(inner)


def test_smoothed_labels():
  one = step.smooth_labels(jnp.array([[2]]), jnp.ones((1, 1)), 4, 0.1)
  np.testing.assert_allclose(one, [[0.025, 0.025, 0.925, 0.025]], rtol=1e-6)


def test_labels_of_mixed_images_are_smoothed_after_mixing():
  labels = jnp.array([[2, 0], [1, 1], [3, 2]])
  weights = jnp.array([[0.7, 0.3], [0.4, 0.6], [0.0, 0.0]])
  targets = step.smooth_labels(labels, weights, 4, 0.1)
  mixed = np.array([[0.3, 0, 0.7, 0], [0, 1, 0, 0]])
  np.testing.assert_allclose(targets[:2], mixed * 0.9 + 0.025, rtol=1e-6)
  np.testing.assert_array_equal(targets[2], np.zeros(4))
  np.testing.assert_array_equal(step.main_label(labels, weights), [2, 1, -1])


def test_normalisation_has_imagenets_statistics():
  pixel = np.array([[255 * 0.485, 255 * 0.456, 255 * (0.406 + 0.225)]])
  np.testing.assert_allclose(
    inputs.normalize_images(pixel), [[0, 0, 1]], atol=1e-5
  )
  assert (
    inputs.normalize_images(np.zeros((1, 3), np.uint8)).dtype == jnp.float32
  )


def test_normalisation_of_blocks():
  batch, blocks = (make(0)['image'] for make in (make_batch, make_blocks))
  np.testing.assert_array_equal(
    inputs.normalize_images(blocks),
    stem.to_blocks(inputs.normalize_images(batch)),
  )


def write_golden():
  """Write `golden/losses.json` from the current step."""
  runner = Runner(make_trainer(), 8)
  _, rows = runner.run(runner.fresh_state(), map(make_batch, range(10)))
  losses = [float(row['loss']) for row in rows]
  GOLDEN_LOSSES.write_text(json.dumps(losses, indent=1) + '\n')


if __name__ == '__main__':
  write_golden()
