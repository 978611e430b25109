"""Rematerialisation and accumulation save memory and change no value."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nfnet_jax
from nfnet_jax.training import data_parallel, state, step
from tests.models import families
from tests.training import small_models
from tests.training.batches import random_batch

BATCH, SIZE = 8, 32
RATES = {'stochdepth_rate': 0.3, 'dropout_rate': 0.2}


def make_trainer(model=None, **more):
  return step.Trainer(
    model=model or small_models.residual(**RATES),
    optimizer=optax.sgd(0.1),
    schedule=optax.constant_schedule(0.1),
    num_classes=10,
    global_batch=BATCH,
    **more,
  )


def make_state(trainer):
  """Return a state whose branches have an effect from the start."""
  made = state.create_state(
    trainer.model, trainer.optimizer, seed=0, image_size=SIZE
  )
  open_branch = lambda path, leaf: (
    jnp.full_like(leaf, 0.8) if path[-1].key == 'skip_gain' else leaf
  )
  params = jax.tree_util.tree_map_with_path(open_branch, made.params)
  return made._replace(params=params)


def make_batch():
  batch = random_batch(0, count=BATCH, size=SIZE, classes=10)
  other = random_batch(1, count=BATCH, size=SIZE, classes=10)
  return {
    **batch,
    'label': np.concatenate([batch['label'], other['label']], axis=1),
    'weight': np.tile(np.float32([0.7, 0.3]), (BATCH, 1)),
  }


def lower(trainer):
  """Lower the gradient of a step, including SAM's perturbation."""

  def gradients(before, batch):
    return trainer.gradients(trainer.perturb(before, batch), before, batch)

  shapes = state.abstract_state(trainer.model, trainer.optimizer, SIZE)
  return jax.jit(gradients).lower(shapes, make_batch())


def gradients(trainer):
  return lower(trainer).compile()(make_state(trainer), make_batch())


def assert_same(one, other):
  for leaf, same in zip(*map(jax.tree.leaves, (one, other)), strict=True):
    np.testing.assert_allclose(leaf, same, rtol=1e-4, atol=2e-6)


@pytest.fixture(scope='module')
def plain():
  made = gradients(make_trainer())
  assert all(np.any(leaf) for leaf in jax.tree.leaves(made[1]))
  return made


class TestRemat:
  @pytest.mark.parametrize(
    'microbatches', [pytest.param(1, marks=pytest.mark.slow), 2]
  )
  def test_gradients_are_the_same(self, plain, microbatches):
    trainer = make_trainer(remat=True, accumulate=microbatches)
    assert_same(plain, gradients(trainer))

  @pytest.mark.full
  @pytest.mark.parametrize('name', ['bn_resnet_pico', 'efficientnet_pico'])
  def test_with_batch_statistics(self, name):
    trainer = make_trainer(nfnet_jax.create(name, 10, **RATES))
    again = dataclasses.replace(trainer, remat=True)
    assert_same(gradients(trainer), gradients(again))

  def test_computes_the_blocks_again(self):
    count = [
      lower(make_trainer(remat=remat)).as_text().count('stablehlo.convolution')
      for remat in (False, True)
    ]
    # One in each of two branches.
    assert count[1] - count[0] == 2


class TestAccumulation:
  @pytest.mark.parametrize(
    'microbatches', [4, pytest.param(8, marks=pytest.mark.slow)]
  )
  def test_gradients_are_the_same(self, plain, microbatches):
    assert_same(plain, gradients(make_trainer(accumulate=microbatches)))

  # SAM uses 2, 4 or 3 of 8 examples; 3 is not a multiple of microbatches.
  @pytest.mark.parametrize(
    'share',
    [
      pytest.param(0.2, marks=pytest.mark.slow),
      pytest.param(0.5, marks=pytest.mark.slow),
      pytest.param(0.4, marks=pytest.mark.slow),
    ],
  )
  def test_with_sam(self, share):
    trainer = make_trainer(sam_rho=0.05, sam_share=share)
    accumulating = dataclasses.replace(trainer, accumulate=4)
    assert_same(gradients(trainer), gradients(accumulating))

  @pytest.mark.slow
  def test_of_an_nfnet_with_sam_and_recomputed_blocks(self):
    with families.small_nfnet(depth=(1, 1, 0, 0)) as name:
      model = nfnet_jax.create(name, 10, **RATES)
      trainer = make_trainer(model, sam_rho=0.05, sam_share=0.5)
      frugal = dataclasses.replace(trainer, accumulate=2, remat=True)
      assert_same(gradients(trainer), gradients(frugal))

  @pytest.mark.slow
  def test_on_several_devices(self, plain):
    trainer = make_trainer(accumulate=2)
    parallel = data_parallel.DataParallel(jax.local_devices()[:2])
    run = parallel.train_step(trainer)
    placed = parallel.replicate(make_state(trainer))
    _, metrics = run(placed, parallel.shard_batch(make_batch()))
    (loss, (top1, _)), grads = plain
    np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics['top1'], top1, rtol=1e-5)
    norm = optax.tree.norm(grads)
    np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-4)

  def test_takes_less_memory(self):
    whole, quarter = (
      lower(make_trainer(accumulate=microbatches))
      .compile()
      .memory_analysis()
      .temp_size_in_bytes
      for microbatches in (1, 4)
    )
    assert quarter < 0.5 * whole
