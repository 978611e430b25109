"""A step with sharded kernels equals the replicated one."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nfnet_jax
from nfnet_jax import trees
from nfnet_jax.training import data_parallel, layouts, state, step
from tests.models import families
from tests.training import small_models
from tests.training.batches import random_batch

DEVICES, BATCH, SIZE = 8, 16, 32


def make_trainer(model, recipe=(), **more):
  schedule = lambda count: 0.05 + 0.01 * count
  return step.Trainer(
    model=model,
    optimizer=nfnet_jax.make_optimizer(
      schedule, **{'clipping': 0.02, **dict(recipe)}
    ),
    schedule=schedule,
    num_classes=10,
    global_batch=BATCH,
    ema_decay=0.9,
    **more,
  )


def make_state(trainer):
  made = state.create_state(
    trainer.model, trainer.optimizer, seed=0, image_size=SIZE
  )
  # Skip gains are not zero, so that the branches have an effect.
  open_branch = lambda path, leaf: leaf + 0.5 * path.endswith('skip_gain')
  return jax.device_get(
    made._replace(params=trees.map_named(open_branch, made.params))
  )


def make_batch(index):
  return random_batch(index, count=BATCH, size=SIZE, classes=10)


def shard(trainer, min_size=200):
  shapes = state.abstract_state(trainer.model, trainer.optimizer, SIZE)
  layout = layouts.shard_kernels(shapes, DEVICES, min_size)
  return dataclasses.replace(trainer, layout=layout)


class Training:
  """A trainer on all devices, compiled once."""

  def __init__(self, trainer):
    self.layout = trainer.layout
    self.devices = data_parallel.DataParallel()
    self.update = self.devices.train_step(trainer)
    self.gather = self.devices.gather_state(trainer.layout)

  def run(self, initial, batches):
    """Return the plain state after training, and all metrics."""
    reached, rows = self.devices.shard_state(self.layout, initial), []
    for batch in batches:
      reached, metrics = self.update(reached, self.devices.shard_batch(batch))
      rows.append(jax.tree.map(float, jax.device_get(metrics)))
    return jax.device_get(self.gather(reached)), rows


def assert_alike(one, other, **tolerances):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(*map(jax.tree.leaves, (one, other))):
    np.testing.assert_allclose(a, b, **tolerances)


@pytest.fixture(scope='module')
def plain():
  return make_trainer(small_models.residual())


@pytest.fixture(scope='module')
def initial(plain):
  return make_state(plain)


@pytest.fixture(scope='module')
def sharded(plain):
  return Training(shard(plain))


@pytest.fixture(scope='module')
def ten_steps(plain, initial):
  return Training(plain).run(initial, map(make_batch, range(10)))


@pytest.fixture(scope='module')
def sharded_ten_steps(sharded, initial):
  return sharded.run(initial, map(make_batch, range(10)))


def test_metrics_of_ten_steps_are_equal(ten_steps, sharded_ten_steps):
  for row, same in zip(ten_steps[1], sharded_ten_steps[1], strict=True):
    assert row == pytest.approx(same, rel=1e-5, abs=1e-7)


def test_states_after_ten_steps_are_equal(ten_steps, sharded_ten_steps):
  assert_alike(ten_steps[0], sharded_ten_steps[0], rtol=1e-4, atol=2e-6)


def test_clipped_fractions_are_those_of_all_units(ten_steps, sharded_ten_steps):
  """Bit for bit, for kernels of which some are sharded and some are not."""
  shares = collections.defaultdict(list)
  for rows in (ten_steps[1], sharded_ten_steps[1]):
    for row in rows:
      for name, value in row.items():
        if name.startswith('clipped'):
          shares[name].append(value)
  assert set(shares) == {
    'clipped',
    'clipped/kernels',
    'clipped/gains and biases',
  }
  for name, values in shares.items():
    assert values[:10] == values[10:], name
    assert 0 < max(values) < 1


def test_each_device_holds_only_its_shard(plain, initial):
  layout, devices = shard(plain).layout, data_parallel.DataParallel()
  placed = devices.shard_state(layout, initial)
  assert layout.sharded == {
    'Net/~/stem/w',
    'Net/~/block_0/~/conv/w',
    'Net/~/block_1/~/conv/w',
  }
  sharded, replicated = placed
  whole = dict(trees.named_leaves(initial))
  assert whole.keys() == sharded.keys() | replicated.keys()
  for path, leaf in sharded.items():
    assert any(path.endswith(kernel) for kernel in layout.sharded)
    assert leaf.size == whole[path].size
    assert leaf.shape[0] == DEVICES
    assert leaf.sharding.shard_shape(leaf.shape)[0] == 1
  for leaf in replicated.values():
    assert leaf.sharding.is_fully_replicated
  # Parameters, EMA and momentum.
  assert len(sharded) == 3 * len(layout.sharded)


def test_shapes_of_a_shard_are_those_of_placed_leaves(plain, initial):
  layout = shard(plain).layout
  placed = data_parallel.DataParallel().shard_state(layout, initial)
  held = {**placed[0], **placed[1]}
  shapes = layout.shard_shapes(jax.eval_shape(lambda: initial))
  for path, planned in trees.named_leaves(shapes):
    leaf = held[path].addressable_shards[0].data
    assert (leaf.size, leaf.dtype) == (planned.size, planned.dtype)


def test_sharded_and_gathered_state_is_the_same(plain, initial):
  layout, devices = shard(plain).layout, data_parallel.DataParallel()
  numbered = trees.map_named(
    lambda path, leaf: (
      np.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape)
      + len(path) * (leaf.ndim > 0)
    ),
    initial,
  )
  placed = devices.shard_state(layout, numbered)
  assert_alike(numbered, devices.gather_state(layout)(placed), rtol=0)


def test_small_or_odd_kernels_are_not_sharded(plain):
  made = state.abstract_state(plain.model, plain.optimizer, SIZE)
  shapes = dict(trees.named_leaves(made.params))
  sharded = shard(plain, min_size=2000).layout.sharded
  assert sharded
  for path, leaf in shapes.items():
    is_large = path.endswith('/w') and leaf.size >= 2000
    assert (path in sharded) == (is_large and leaf.shape[-1] % DEVICES == 0)
  assert 'Net/~/linear/w' not in shard(plain, min_size=1).layout.sharded


@pytest.mark.parametrize('spoil', ['image', 'step'])
def test_bad_step_changes_nothing(sharded, initial, spoil):
  batch = make_batch(0)
  batch[spoil] = batch[spoil] + (np.nan if spoil == 'image' else 1)
  after, (row,) = sharded.run(initial, [batch])
  assert row['applied'] == 0
  assert_alike(initial, after, rtol=0)


@pytest.mark.slow
def test_bfloat16_trains_alike(plain, initial):
  trainer = dataclasses.replace(plain, compute_dtype=jnp.bfloat16)
  batches = [make_batch(index) for index in range(3)]
  _, rows = Training(trainer).run(initial, batches)
  _, same = Training(shard(trainer)).run(initial, batches)
  for row, other in zip(rows, same):
    assert row['loss'] == pytest.approx(other['loss'], rel=1e-2)


def check_two_steps(plain):
  initial, batches = make_state(plain), [make_batch(0), make_batch(1)]
  one, rows = Training(plain).run(initial, batches)
  other, same = Training(shard(plain, 512)).run(initial, batches)
  assert rows == [pytest.approx(row, rel=1e-4, abs=1e-6) for row in same]
  assert_alike(one.step, other.step)
  assert_alike(one.model_state, other.model_state, rtol=1e-4, atol=1e-5)
  assert_alike(one.ema_params, other.ema_params, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('options', 'more'),
  [
    ({}, {'accumulate': 2, 'remat': True}),
    ({'fast_stem': True, 'fused_blocks': True}, {}),
  ],
)
def test_nfnets_train_alike(options, more):
  with families.small_nfnet(depth=(1, 1, 0, 0)) as name:
    check_two_steps(make_trainer(nfnet_jax.create(name, 10, **options), **more))


@pytest.mark.full
@pytest.mark.parametrize(
  ('name', 'recipe'),
  [
    ('nf_resnet_pico', {'clipping': 0, 'rms_decay': 0.9}),
    ('bn_resnet_pico', {}),
  ],
)
def test_other_networks_train_alike(name, recipe):
  check_two_steps(make_trainer(nfnet_jax.create(name, 10), recipe))
