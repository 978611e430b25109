"""Fused blocks and fast convolutions against the plain ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnet_jax.models import layers, registry
from nfnet_jax.models.fast import blocks
from tests.models import families, reference


def gradients(function, *inputs):
  """Return the value, gradients for a random cotangent, and other outputs.

  `function` returns the value and a tree of other outputs.
  """
  shape = jax.eval_shape(function, *inputs)[0]
  cotangent = random(shape.shape, shape.dtype, seed=9)

  @jax.jit
  def run(*inputs):
    value, pull_back, others = jax.vjp(function, *inputs, has_aux=True)
    return value, pull_back(cotangent), others

  return run(*inputs)


def compare(plain, fast, *inputs, tolerance):
  """Compare the values and gradients of two functions of arrays."""
  results = (
    gradients(lambda *inputs, f=function: (f(*inputs), ()), *inputs)
    for function in (plain, fast)
  )
  assert_close(*results, tolerance)


def random(shape, dtype=jnp.float32, *, seed=0, mean=0.0, std=1.0):
  """Draw an array; NumPy has nothing to compile."""
  draws = np.random.default_rng(seed).normal(mean, std, shape)
  return jnp.asarray(draws, dtype)


def assert_close(one, other, tolerance):
  """Compare trees leaf by leaf, by norm."""
  for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
    assert a.dtype == b.dtype
    a, b = np.float64(a), np.float64(b)
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(a) + 1e-7


@pytest.mark.parametrize(
  ('dtype', 'tolerance'),
  [(jnp.float64, 1e-14), (jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)],
)
def test_gelu(dtype, tolerance):
  with jax.enable_x64(dtype == jnp.float64):
    x = jnp.asarray(np.linspace(-12, 12, 4001), dtype)
    plain = layers.scaled_activation('gelu')
    compare(plain, blocks.scaled_gelu, x, tolerance=tolerance)


def test_gelu_far_from_zero():
  far = jnp.asarray([-1e4, -100.0, 100.0, 1e4])
  slope = jax.vmap(jax.grad(blocks.gelu))(far)
  np.testing.assert_array_equal(slope, far > 0)


def test_gelu_keeps_only_its_input():
  x = jnp.zeros((4, 8))
  _, pull_back = jax.vjp(blocks.gelu, x)
  kept = [leaf for leaf in jax.tree.leaves(pull_back) if jnp.ndim(leaf)]
  assert [leaf.shape for leaf in kept] == [(4, 8)]


@pytest.mark.parametrize('shape', [(1, 1, 24, 5), (3, 3, 8, 6), (3, 3, 1, 2)])
@pytest.mark.parametrize(
  ('dtype', 'tolerance'), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)]
)
def test_standardize(shape, dtype, tolerance):
  w = random(shape, dtype, mean=0.05, std=0.1)
  gain = random(shape[-1:], dtype, seed=1, mean=1.0)
  compare(layers.standardize, blocks.standardize, w, gain, tolerance=tolerance)


@pytest.mark.parametrize(('std', 'tolerance'), [(1e-4, 1e-5), (0.0, 1e-6)])
def test_standardize_below_eps(std, tolerance):
  """A kernel that hardly varies is divided by a constant."""
  w, gain = random((1, 1, 8, 3), mean=1.0, std=std), jnp.ones(3)
  compare(layers.standardize, blocks.standardize, w, gain, tolerance=tolerance)


FAST_PATHS = 'fused_blocks', 'fast_convs'


@pytest.fixture(scope='module')
def network():
  """Return a constructor: an NFNet of one plain and two transition blocks."""
  with families.small_nfnet(depth=(1, 2, 0, 0)) as name:
    yield functools.partial(
      registry.create_model, name, 10, stochdepth_rate=0.5
    )


@pytest.fixture(scope='module')
def inputs(network):
  """Return parameters that all have an effect, and images."""
  images = random((4, 32, 32, 3))
  plain, fused = (
    lambda key, fused=fused: network(fused_blocks=fused).init(
      key, images, False
    )[0]
    for fused in (False, True)
  )
  params = jax.tree.map(jnp.float32, reference.random_params(plain))
  shapes = jax.eval_shape(fused, jax.random.key(1))
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
  return params, images


@pytest.fixture(scope='module')
def run(network, inputs):
  """Return a function that computes logits, gradients and statistics, once.

  The gradients are those with respect to parameters and images; the statistics
  are the blocks'.
  """

  @functools.cache
  def run(dtype=jnp.float32, is_training=True, **options):
    model = network(**options)

    def logits(params, images):
      # Rates are positive: the key decides which branches are dropped.
      key = jax.random.key(5) if is_training else None
      outputs, _ = model.endpoints(params, {}, key, images, is_training)
      return outputs.pop('logits'), outputs

    cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
    return jax.tree.map(
      lambda leaf: np.asarray(leaf, np.float64),
      gradients(logits, *cast(inputs)),
    )

  return run


@pytest.mark.parametrize(
  ('is_training', 'fast_path'),
  [
    (True, 'fused_blocks'),
    pytest.param(False, 'fused_blocks', marks=pytest.mark.slow),
    pytest.param(True, 'fast_convs', marks=pytest.mark.slow),
    pytest.param(False, 'fast_convs', marks=pytest.mark.slow),
  ],
)
def test_network_in_float32(run, is_training, fast_path):
  plain = run(is_training=is_training)
  assert 'residual_var' in plain[2]['block_0']
  fast = run(is_training=is_training, **{fast_path: True})
  # How sums are rounded depends on the processor; 1.2e-5 was seen.
  assert_close(plain, fast, 3e-5)


@pytest.mark.slow
@pytest.mark.parametrize('fast_path', FAST_PATHS)
def test_network_in_bfloat16_is_as_exact(run, fast_path):
  exact = run()[:2]

  def error(**options):
    rough = run(jnp.bfloat16, **options)[:2]
    square = lambda tree: sum(
      np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)
    )
    return square(jax.tree.map(np.subtract, rough, exact)) / square(exact)

  plain = error()
  assert error(**{fast_path: True}) < 1.5 * plain < 0.1


@pytest.mark.slow
def test_fused_blocks_take_other_activations(run):
  plain = run(activation='silu')
  assert_close(plain, run(activation='silu', fused_blocks=True), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('fast_path', FAST_PATHS)
def test_fast_paths_take_timm_forward(run, fast_path):
  plain = run(timm_forward=True)
  assert_close(plain, run(timm_forward=True, **{fast_path: True}), 1e-5)


@pytest.mark.parametrize('fast_path', ['fused_blocks', 'fast_stem'])
@pytest.mark.parametrize('activation', layers.ACROSS_CHANNELS)
def test_channels_that_depend_on_others_are_refused(
  network, fast_path, activation
):
  with pytest.raises(ValueError, match=f"'{activation}' works across channels"):
    network(activation=activation, **{fast_path: True})
