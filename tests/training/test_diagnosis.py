"""The diagnosis of a step that is not finite, by injected values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nfnet_jax
from nfnet_jax.models import layers
from nfnet_jax.models.fast import stem
from nfnet_jax.training import data_parallel, nonfinite, state, step
from tests.models import families
from tests.training import small_models
from tests.training.batches import random_batch

BATCH, SIZE = 8, 32


def make_batch():
  return random_batch(0, count=BATCH, size=SIZE, classes=10)


def diagnose(model, batch, change=lambda leaf: leaf):
  """Diagnose the first step from changed parameters."""
  trainer = step.Trainer(
    model=model,
    optimizer=optax.sgd(0.1),
    schedule=optax.constant_schedule(0.1),
    num_classes=10,
    global_batch=BATCH,
  )
  first = state.create_state(model, trainer.optimizer, seed=0, image_size=SIZE)
  first = first._replace(params=jax.tree.map(change, first.params))
  parallel = data_parallel.DataParallel(jax.local_devices()[:2])
  return nonfinite.diagnose(trainer, parallel, parallel.replicate(first), batch)


def test_diagnosis_names_the_gradient_that_broke_first(monkeypatch):
  """Inject a NaN into the backward pass of the first block's squeeze."""

  @jax.custom_vjp
  def poison(x):
    return x

  poison.defvjp(lambda x: (x, None), lambda _, g: (g * jnp.nan,))
  squeeze, calls = layers.SqueezeExcite.__call__, []

  def poisoned(self, x):
    calls.append(self.module_name)
    return squeeze(self, poison(x) if 'block_0' in self.module_name else x)

  monkeypatch.setattr(layers.SqueezeExcite, '__call__', poisoned)
  error = diagnose(small_models.residual(), make_batch())
  assert calls
  assert error.step == 0
  first = error.tensors[0]
  assert first.startswith('gradient of Net/~/block_0/~/conv/'), first
  assert 'gradient of Net/~/stem/w' in error.tensors
  assert not [name for name in error.tensors if 'block_1' in name]


def test_parameters_are_named_in_the_order_of_computation():
  spoil = lambda leaf: np.full_like(leaf, np.nan)
  tensors = diagnose(small_models.residual(), make_batch(), spoil).tensors
  modules = list(dict.fromkeys(name.rsplit('/', 1)[0] for name in tensors))
  assert modules[:3] == [
    'Net/~/stem',
    'Net/~/block_0/~/conv',
    'Net/~/block_0/~/squeeze_excite/~/linear',
  ]
  assert tensors.index('Net/~/linear/w') > tensors.index(
    'Net/~/block_1/skip_gain'
  )


@pytest.mark.slow
def test_order_is_the_same_with_a_fast_stem():
  batch = make_batch()
  blocks = {**batch, 'image': np.asarray(stem.to_blocks(batch['image']))}
  spoil = lambda leaf: np.full_like(leaf, np.nan)
  with families.small_nfnet(depth=(1, 1, 0, 0)) as name:
    plain = diagnose(nfnet_jax.create(name, 10), batch, spoil)
    fast = diagnose(nfnet_jax.create(name, 10, fast_stem=True), blocks, spoil)
  assert fast.tensors == plain.tensors
  assert plain.tensors[0] == 'NFNet/~/stem_conv0/w'
