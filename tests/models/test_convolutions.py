"""Fast convolutions against plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnet_jax.models import layers
from nfnet_jax.models.fast import convolutions

# Image's side, kernel's side, inputs, outputs, stride, groups.
CASES = [
  (6, 1, 8, 12, 1, 1),
  (6, 1, 8, 12, 2, 1),
  (6, 1, 8, 12, 1, 2),
  (6, 3, 8, 12, 1, 4),
  (7, 3, 12, 6, 2, 3),
  (6, 3, 8, 8, 2, 1),
  (7, 5, 8, 8, 1, 8),
  (6, 3, 8, 8, 2, 8),
  (7, 3, 8, 8, 2, 8),
]


def compute(convolve, case, dtype, **options):
  """Return the value, and gradients for a random cotangent."""
  side, taps, inputs, outputs, stride, groups = case
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  x = draw(2, side, side, inputs)
  kernel = draw(taps, taps, inputs // groups, outputs)
  out = -(-side // stride)
  cotangent = draw(2, out, out, outputs)

  @jax.jit
  def both(x, kernel, cotangent):
    value, pull_back = jax.vjp(
      lambda x, kernel: convolve(x, kernel, stride, groups, **options),
      x,
      kernel,
    )
    return value, *pull_back(cotangent)

  return both(x, kernel, cotangent)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize(
  ('dtype', 'tolerance'),
  [
    (jnp.float32, 2e-6),
    pytest.param(jnp.bfloat16, 2e-2, marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize('symmetric', [False, True])
def test_values_and_gradients(case, dtype, tolerance, symmetric):
  plain = compute(layers.convolve, case, dtype, symmetric=symmetric)
  fast = compute(convolutions.convolve, case, dtype, symmetric=symmetric)
  for one, other in zip(plain, fast, strict=True):
    assert one.dtype == other.dtype
    one, other = np.float64(one), np.float64(other)
    assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(one)


@pytest.mark.parametrize('case', CASES)
def test_kernels_that_are_split_beforehand(case):
  def given_split(x, kernel, stride, groups):
    kernel = convolutions.split_kernel(kernel, groups)
    return convolutions.convolve(x, kernel, stride, groups)

  for one, other in zip(
    compute(convolutions.convolve, case, jnp.float32),
    compute(given_split, case, jnp.float32),
    strict=True,
  ):
    np.testing.assert_array_equal(one, other)


def test_bfloat16_kernels_get_sums_over_all_pixels():
  """In bfloat16 a sum of positive numbers stops growing at 256 of them."""
  x, kernel = jnp.ones((2, 56, 56, 4)), jnp.ones((3, 3, 1, 4))

  def gradient(dtype):
    total = lambda kernel: jnp.sum(
      convolutions.convolve(x.astype(dtype), kernel, 1, 4), dtype=jnp.float32
    )
    return jax.jit(jax.grad(total))(kernel.astype(dtype))

  np.testing.assert_allclose(
    np.float32(gradient(jnp.bfloat16)), gradient(jnp.float32), rtol=1e-2
  )


@pytest.mark.parametrize(('groups', 'plain'), [(2, 2), (8, 0)])
def test_no_grouped_convolution_is_left(groups, plain):
  text = jax.jit(convolutions.convolve, static_argnums=(2, 3)).lower(
    jnp.ones((2, 6, 6, 8)), jnp.ones((3, 3, 8 // groups, 8)), 1, groups
  )
  assert text.as_text().count('stablehlo.convolution') == plain
  assert f'feature_group_count = {groups}' not in text.as_text()
