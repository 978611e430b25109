"""Fused blocks and fast convolutions against the plain ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnet_jax.models import layers, registry
from nfnet_jax.models.fast import blocks
from tests.models import families


def gradients(function, *inputs):
  """Return the value, and the gradients for a random cotangent."""

  @jax.jit
  def both(*inputs):
    value, pull_back = jax.vjp(function, *inputs)
    cotangent = jax.random.normal(jax.random.key(9), value.shape)
    return value, pull_back(cotangent.astype(value.dtype))

  return both(*inputs)


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
    x = jnp.linspace(-12, 12, 4001).astype(dtype)
    plain = gradients(layers.scaled_activation('gelu'), x)
    assert_close(plain, gradients(blocks.scaled_gelu, x), tolerance)


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
  keys = jax.random.split(jax.random.key(0), 2)
  w = 0.1 * jax.random.normal(keys[0], shape) + 0.05
  w, gain = w.astype(dtype), (1 + jax.random.normal(keys[1], shape[-1:]))
  gain = gain.astype(dtype)
  plain = gradients(layers.standardize, w, gain)
  assert_close(plain, gradients(blocks.standardize, w, gain), tolerance)


def test_standardize_below_eps():
  """A kernel that hardly varies is divided by a constant."""
  w = 1 + 1e-4 * jax.random.normal(jax.random.key(0), (1, 1, 8, 3))
  plain = gradients(layers.standardize, w, jnp.ones(3))
  assert_close(plain, gradients(blocks.standardize, w, jnp.ones(3)), 1e-5)
  constant = gradients(blocks.standardize, jnp.ones_like(w), jnp.ones(3))
  assert_close(
    gradients(layers.standardize, jnp.ones_like(w), jnp.ones(3)), constant, 1e-6
  )


FAST_PATHS = 'fused_blocks', 'fast_convs'


@pytest.fixture(scope='module')
def network():
  """Return a constructor: an NFNet of one plain and three transition blocks."""
  with families.small_nfnet(depth=(1, 2, 1, 0)) as name:
    yield functools.partial(
      registry.create_model, name, 10, stochdepth_rate=0.5
    )


@pytest.fixture(scope='module')
def inputs(network):
  """Return parameters that all have an effect, and images."""
  images = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
  init = lambda key: network().init(key, images, False)[0]
  params = jax.jit(init)(jax.random.key(1))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  moved = [
    leaf + 0.05 * jax.random.normal(key, leaf.shape)
    for leaf, key in zip(leaves, keys)
  ]
  params = jax.tree.unflatten(tree, moved)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(
    jnp.shape,
    jax.eval_shape(
      lambda key: network(fused_blocks=True).init(key, images, False)[0],
      jax.random.key(1),
    ),
  )
  return params, images


def run(network, inputs, dtype, *, is_training=True, **options):
  """Return logits and gradients with respect to parameters and images."""
  model = network(**options)
  key = jax.random.key(5) if is_training else None

  def logits(params, images):
    return model.apply(params, {}, key, images, is_training)[0]

  cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
  return jax.tree.map(
    lambda leaf: leaf.astype(jnp.float32), gradients(logits, *cast(inputs))
  )


@pytest.mark.parametrize('fast_path', FAST_PATHS)
@pytest.mark.parametrize('is_training', [True, False])
def test_network_in_float32(network, inputs, is_training, fast_path):
  options = {'dtype': jnp.float32, 'is_training': is_training}
  plain = run(network, inputs, **options)
  assert_close(
    plain, run(network, inputs, **options, **{fast_path: True}), 1e-5
  )


@pytest.mark.parametrize('fast_path', FAST_PATHS)
def test_network_in_bfloat16_is_as_exact(network, inputs, fast_path):
  exact = run(network, inputs, jnp.float32)

  def error(**options):
    rough = run(network, inputs, jnp.bfloat16, **options)
    square = lambda tree: sum(
      np.sum(np.square(np.float64(leaf))) for leaf in jax.tree.leaves(tree)
    )
    return square(jax.tree.map(jnp.subtract, rough, exact)) / square(exact)

  plain = error()
  assert error(**{fast_path: True}) < 1.5 * plain < 0.1


def test_endpoints_are_the_same(network, inputs):
  plain, fast = (
    jax.jit(
      lambda params, images, fused=fused: network(fused_blocks=fused).endpoints(
        params, {}, jax.random.key(5), images, True
      )[0]
    )(*inputs)
    for fused in (False, True)
  )
  assert 'residual_var' in plain['block_0']
  assert_close(plain, fast, 1e-5)


def test_fused_blocks_take_other_activations(network, inputs):
  options = {'dtype': jnp.float32, 'activation': 'silu'}
  plain = run(network, inputs, **options)
  assert_close(plain, run(network, inputs, **options, fused_blocks=True), 1e-5)


@pytest.mark.parametrize('fast_path', FAST_PATHS)
def test_fast_paths_take_timm_forward(network, inputs, fast_path):
  options = {'dtype': jnp.float32, 'timm_forward': True}
  plain = run(network, inputs, **options)
  assert_close(
    plain, run(network, inputs, **options, **{fast_path: True}), 1e-5
  )


@pytest.mark.parametrize('fast_path', ['fused_blocks', 'fast_stem'])
@pytest.mark.parametrize('activation', layers.ACROSS_CHANNELS)
def test_channels_that_depend_on_others_are_refused(
  network, fast_path, activation
):
  with pytest.raises(ValueError, match=f"'{activation}' works across channels"):
    network(activation=activation, **{fast_path: True})
