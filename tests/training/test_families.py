"""A miniature of every family trains and evaluates on eight devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nfnet_jax
from nfnet_jax.training import data_parallel, evaluation, state, step
from tests.training import small_models
from tests.training.batches import random_batch

BATCH = 32
SIZE = 32
STEPS = 12


def make_trainer(model, num_classes):
  rate = 0.03
  return step.Trainer(
    model=model,
    # Without clipping, which other tests cover, for a quicker compilation.
    optimizer=nfnet_jax.make_optimizer(rate, clipping=0),
    schedule=optax.constant_schedule(rate),
    num_classes=num_classes,
    global_batch=BATCH,
    ema_decay=0.5,
  )


def make_family(name, **options):
  model = nfnet_jax.create(
    name, 10, stochdepth_rate=0.05, dropout_rate=0.0, **options
  )
  return make_trainer(model, 10)


def make_normalised(**options):
  """Return a trainer of a small network with batch statistics."""
  return make_trainer(small_models.normalised(**options), small_models.CLASSES)


def make_batch(index):
  """Return a batch with the same images and labels for every step."""
  return random_batch(index, count=BATCH, size=SIZE, classes=10, seed=0)


def train(trainer, devices, steps=STEPS):
  """Return the first and the last state, the metrics, and the devices."""
  parallel = data_parallel.DataParallel(jax.local_devices()[:devices])
  initial = state.create_state(
    trainer.model, trainer.optimizer, seed=1, image_size=SIZE
  )
  initial = jax.device_get(initial)
  train_state = parallel.replicate(initial)
  # Compiled ahead of time: a state of other dtypes would be an error.
  compiled = (
    parallel.train_step(trainer)
    .lower(train_state, parallel.shard_batch(make_batch(0)))
    .compile({'xla_backend_optimization_level': 0})
  )
  rows = []
  for index in range(steps):
    batch = parallel.shard_batch(make_batch(index))
    train_state, metrics = compiled(train_state, batch)
    rows.append(jax.device_get(metrics))
  return initial, jax.device_get(train_state), rows, parallel


def losses(rows):
  return [float(row['loss']) for row in rows]


def evaluate(trainer, parallel, train_state):
  batch = make_batch(0)
  batch = {'image': batch['image'], 'label': batch['label'][:, 0]}
  # Thirteen examples, a prime number; the others are padding.
  batch['mask'] = (np.arange(BATCH) < 13).astype(np.float32)
  return evaluation.evaluate(
    parallel.eval_step(evaluation.evaluator(trainer.model)),
    parallel,
    evaluation.weights_of(parallel.replicate(train_state)),
    [batch],
  )


@pytest.fixture(scope='module')
def per_device():
  """Train a batch-normalised network with statistics per device."""
  trainer = make_family('bn_resnet_pico')
  return trainer, *train(trainer, 8)


def check_training(trainer, initial, final, rows, parallel):
  assert all(row['applied'] == 1 for row in rows)
  assert losses(rows)[-1] < 0.97 * losses(rows)[0]
  same_type = lambda old, new: old.dtype == new.dtype and old.shape == new.shape
  assert jax.tree.all(jax.tree.map(same_type, initial, final))
  results = evaluate(trainer, parallel, final)
  assert results['eval/examples'] == results['eval_ema/examples'] == 13
  assert np.isfinite([results['eval/loss'], results['eval_ema/loss']]).all()


@pytest.mark.slow
def test_batch_normalised_network_trains(per_device):
  check_training(*per_device)


@pytest.mark.full
@pytest.mark.parametrize(
  'name',
  [
    'nfnet_pico_bn',
    'nf_resnet_pico',
    'nf_regnet_pico',
    'senet_pico',
    'efficientnet_pico',
  ],
)
def test_family_trains(name):
  trainer = make_family(name)
  check_training(trainer, *train(trainer, 8))


def test_statistics_are_the_mean_over_devices():
  trainer = make_normalised()
  initial, final, rows, parallel = train(trainer, 8, steps=1)
  assert rows[0]['applied'] == 1
  # Running statistics are used, without an error, and padding is not counted.
  assert evaluate(trainer, parallel, final)['eval/examples'] == 13
  batch = make_batch(0)

  @jax.jit
  def next_state(images, positions):
    shard = {'image': images, 'position': positions}
    inputs = trainer.model_inputs(initial, shard)
    return trainer.model.apply(initial.params, *inputs)[1]

  shards = [
    next_state(batch['image'][i : i + 4], batch['position'][i : i + 4])
    for i in range(0, BATCH, 4)
  ]
  mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *shards)
  jax.tree.map(
    lambda ours, theirs: np.testing.assert_allclose(
      ours, theirs, rtol=1e-3, atol=1e-3
    ),
    final.model_state,
    mean,
  )
  counters = [
    leaves['counter']
    for tree in (final.model_state, final.ema_model_state)
    for leaves in tree.values()
  ]
  assert {(int(c), c.dtype.name) for c in counters} == {(1, 'int32')}


def test_shared_statistics_make_eight_devices_equal_one():
  own, shared = (
    train(make_normalised(cross_replica_bn=is_shared), 8)
    for is_shared in (False, True)
  )
  one = train(make_normalised(), 1)
  np.testing.assert_allclose(losses(shared[2]), losses(one[2]), rtol=1e-4)
  for tree in 'params', 'model_state':
    jax.tree.map(
      lambda ours, theirs: np.testing.assert_allclose(
        ours, theirs, rtol=1e-3, atol=1e-4
      ),
      *(getattr(final, tree) for _, final, _, _ in (shared, one)),
    )
  # Statistics per device, of four images each, differ from these.
  difference = np.subtract(losses(own[2]), losses(one[2]))
  assert np.max(np.abs(difference)) > 0.01


@pytest.mark.full
def test_shared_statistics_make_eight_devices_train_as_one(per_device):
  trainer = make_family('bn_resnet_pico', cross_replica_bn=True)
  _, eight, rows, _ = train(trainer, 8, steps=4)
  _, one, one_rows, _ = train(trainer, 1, steps=4)
  np.testing.assert_allclose(losses(rows), losses(one_rows), rtol=1e-3)
  jax.tree.map(
    lambda ours, theirs: np.testing.assert_allclose(
      ours, theirs, rtol=1e-2, atol=1e-2
    ),
    eight.model_state,
    one.model_state,
  )
  # Statistics per device, of four images each, differ from these.
  _, _, _, own_rows, _ = per_device
  assert abs(own_rows[3]['loss'] - rows[3]['loss']) > 0.01


@pytest.mark.full
@pytest.mark.parametrize('name', ['nf_resnet_pico', 'nf_regnet_pico'])
def test_normalizer_free_networks_train_alike_on_one_and_eight_devices(name):
  trainer = make_family(name)
  _, _, rows, _ = train(trainer, 8, steps=6)
  _, _, one_rows, _ = train(trainer, 1, steps=6)
  np.testing.assert_allclose(losses(rows), losses(one_rows), rtol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize(
  'name', ['nf_resnet_pico', 'bn_resnet_pico', 'efficientnet_pico']
)
def test_bfloat16_trains(name):
  trainer = make_family(name)
  low = dataclasses.replace(trainer, compute_dtype=jnp.dtype('bfloat16'))
  _, final, rows, _ = train(low, 8)
  assert losses(rows)[-1] < 0.9 * losses(rows)[0]
  dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(final)}
  assert dtypes == {'float32', 'int32'}
