"""The fast stem against the plain one."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnet_jax.models import nfnet
from nfnet_jax.models.fast import stem as fast_stem


def stem(variant, fast, dtype=jnp.float32, **options):
  """Return a stem's `init` and `(params, images) -> output`, in a dtype."""

  def forward(images):
    model = nfnet.NFNet(10, variant, fast_stem=fast, **options)
    return model.stem(images, is_training=True)

  net = hk.transform(forward)
  cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
  return net.init, lambda params, images: net.apply(
    cast(params), None, cast(images)
  ).astype(jnp.float32)


@functools.cache
def make_inputs(variant, height, width, count=2):
  """Return random parameters, images and a cotangent, all without symmetry."""
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
  images = draw(jnp.empty((count, height, width, 3)))
  init, apply = stem(variant, fast=False)
  shapes = jax.eval_shape(init, jax.random.key(1), images)
  params = jax.tree_util.tree_map_with_path(
    # Standardisation takes kernels of any scale.
    lambda path, leaf: 0.2 * draw(leaf) + (path[-1].key == 'gain'),
    shapes,
  )
  return params, images, draw(jax.eval_shape(apply, params, images))


def value_and_gradients(variant, fast, inputs, dtype=jnp.float32):
  _, apply = stem(variant, fast, dtype)

  @jax.jit
  def both(params, images, cotangent):
    value, pull_back = jax.vjp(apply, params, images)
    return value, pull_back(cotangent)

  return both(*inputs)


def differences(one, other):
  """Return each leaf's distance, as a share of its norm."""
  norm = lambda leaf: np.linalg.norm(np.float64(leaf))
  return {
    jax.tree_util.keystr(path): norm(np.float64(a) - b) / norm(a)
    for (path, a), b in zip(
      jax.tree_util.tree_leaves_with_path(one),
      jax.tree.leaves(other),
      strict=True,
    )
  }


def convolutions(variant, fast, images):
  init, apply = stem(variant, fast)
  params = jax.eval_shape(init, jax.random.key(0), images)
  return str(jax.make_jaxpr(apply)(params, images)).count(
    'conv_general_dilated['
  )


@pytest.mark.parametrize(
  ('variant', 'height', 'width'),
  [
    ('pico', 8, 52),
    pytest.param('pico', 4, 4, marks=pytest.mark.slow),
    pytest.param('nano', 64, 64, marks=pytest.mark.slow),
    pytest.param('f0_plus', 20, 12, marks=pytest.mark.slow),
    pytest.param('f0', 192, 192, marks=pytest.mark.slow),
  ],
)
def test_values_and_gradients(variant, height, width):
  inputs = make_inputs(variant, height, width)
  plain, fast = (
    value_and_gradients(variant, fast, inputs) for fast in (False, True)
  )
  found = differences(plain, fast)
  assert len(found) == 14  # The value, 12 parameters and the images.
  assert max(found.values()) < 5e-6, found


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['pico', 'f0'])
def test_bfloat16_is_as_exact(variant):
  """Rounding changes both stems by 1 to 6 %, and their outputs similarly."""
  inputs = make_inputs(variant, 32, 32)
  exact = value_and_gradients(variant, False, inputs)
  plain, fast = (
    value_and_gradients(variant, fast, inputs, jnp.bfloat16)
    for fast in (False, True)
  )
  assert differences(plain, fast)['[0]'] < 1e-3
  of_plain, of_fast = differences(exact, plain), differences(exact, fast)
  for name, error in of_fast.items():
    assert error < min(0.1, 1.5 * of_plain[name]), name


def lower(function, *args):
  """Return a program as text, which says more than one result of it."""
  return jax.jit(function).lower(*args).as_text()


def test_images_in_blocks_are_the_same_images():
  params, images, _ = make_inputs('pico', 8, 52)
  _, apply = stem('pico', fast=True)
  blocks = fast_stem.to_blocks(images)
  assert blocks.shape == (2, 2, 13, 48)
  # Row, column and colour of a pixel, in this order.
  assert blocks[1, 1, 5, 3 * (4 * 2 + 1) + 2] == images[1, 4 + 2, 20 + 1, 2]
  given_blocks, given_images = jax.jit(
    lambda params, *images: [apply(params, x) for x in images]
  )(params, blocks, images)
  np.testing.assert_array_equal(given_blocks, given_images)


@pytest.mark.parametrize(('height', 'width'), [(30, 32), (32, 33), (7, 7)])
def test_other_sizes_take_the_plain_stem(height, width):
  params, images, _ = make_inputs('pico', height, width)
  plain, fast = (stem('pico', fast)[1] for fast in (False, True))
  assert lower(plain, params, images) == lower(fast, params, images)


def test_uses_blocks_where_sizes_allow():
  count = lambda fast, size: convolutions(
    'pico', fast, jnp.zeros((1, size, size, 3))
  )
  # The third convolution is in two parts.
  assert (count(False, 32), count(True, 32), count(True, 30)) == (4, 5, 4)


@pytest.mark.slow
def test_initial_parameters_are_the_same():
  images = jnp.zeros((1, 4, 4, 3))
  plain, fast = (stem('pico', fast)[0] for fast in (False, True))
  expected = plain(jax.random.key(4), images)
  for given in (images, fast_stem.to_blocks(images)):
    made = fast(jax.random.key(4), given)
    jax.tree.map(np.testing.assert_array_equal, made, expected)
    # In the same order, on which error messages depend.
    assert [(path, *made[path]) for path in made] == [
      (path, *expected[path]) for path in expected
    ]


def test_takes_timm_forward():
  params, images, _ = make_inputs('pico', 8, 52)
  outputs = [
    jax.jit(stem('pico', fast, timm_forward=timm)[1])(params, images)
    for fast, timm in ((False, True), (True, True), (True, False))
  ]
  assert differences(outputs[0], outputs[1])[''] < 3e-6
  assert differences(outputs[0], outputs[2])[''] > 1e-4
