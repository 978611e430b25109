"""Properties of `nfnet_jax.agc` on drawn gradients and weights.

Tolerances are relative. The reference is float64; a float32 norm of at most 48
elements and the two products after it round by less than `ROUNDING`.
"""

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nfnet_jax

ROUNDING = 4e-6
# Products below the smallest normal float32 may become 0.
SUBNORMAL = 2e-38
# Shape -> the axes that a unit's norm is taken over.
UNITS = {
  (): (),
  (6,): (0,),
  (1, 5): (0, 1),
  (3, 1, 1): (0, 1, 2),
  (1, 1, 1, 4): (0, 1, 2, 3),
  (4, 3): (0,),
  (2, 3, 2): (0,),
  (2, 2, 3, 4): (0, 1, 2),
  (2, 1, 2, 2, 3): (0, 1, 2, 3),
  (2, 1, 2, 1, 2, 2): (0, 1, 2, 3, 4),
}


def floats(low, high):
  return st.floats(np.float32(low).item(), np.float32(high).item(), width=32)


def signed(low, high):
  """Draw 0 and numbers of either sign with a magnitude in an interval."""
  size = floats(low, high)
  return st.one_of(st.just(0.0), size, size.map(lambda x: -x))


shapes = st.sampled_from(list(UNITS))
ratios = floats(1e-3, 1.0)
epsilons = st.sampled_from([1e-3, 0.1, 4.0])
property_test = settings(deadline=None, max_examples=50, derandomize=True)


def arrays(shape, elements):
  return hnp.arrays(np.float32, shape, elements=elements)


anything = st.one_of(signed(1e-3, 1e3), st.floats(width=32))
# Some are subnormal; squares stay finite.
gradients = st.one_of(
  signed(1e-4, 1e2), signed(1e-42, 1e-38), signed(1e-38, 1e15)
)
weights = signed(1e-3, 1e1)


@st.composite
def cases(draw, grads=gradients, weights=weights):
  """Draw gradient and weight of one leaf, and the axes of its units."""
  shape = draw(shapes)
  # Units near zero, where eps is the bound, are common.
  scale = np.float32(draw(st.sampled_from([0.0, 1e-4, 1.0, 1e3])))
  weight = scale * draw(arrays(shape, weights))
  return draw(arrays(shape, grads)), weight, UNITS[shape]


@st.composite
def well_scaled(draw):
  """Draw a leaf whose weights and bounds are far above eps and 1e-6."""
  shape = draw(shapes)
  grad = draw(arrays(shape, signed(1e-4, 1e4)))
  weight = draw(arrays(shape, floats(1.0, 1e3)))
  return grad, weight


def run(tx, grad, weight):
  grad, weight = jnp.asarray(grad), jnp.asarray(weight)
  updates, state = tx.update([grad], tx.init([weight]), [weight])
  return np.asarray(updates[0]), state


def clip(grad, weight, ratio, eps=1e-3):
  return run(nfnet_jax.agc(ratio, eps), grad, weight)[0]


def norm(x, axes):
  return np.sqrt(np.sum(np.float64(x) ** 2, axis=axes, keepdims=True))


def bound(weight, axes, ratio, eps):
  return ratio * np.maximum(norm(weight, axes), eps)


def assert_same_bits(actual, desired):
  np.testing.assert_array_equal(actual.view(np.uint32), desired.view(np.uint32))


@pytest.mark.slow
@property_test
@given(cases(), ratios, epsilons)
def test_norm_of_each_unit_is_within_its_bound(case, ratio, eps):
  grad, weight, axes = case
  actual = norm(clip(grad, weight, ratio, eps), axes)
  limit = bound(weight, axes, ratio, eps)
  assert np.all(actual <= limit * (1 + ROUNDING))


@property_test
@given(cases(), ratios, epsilons)
def test_unit_below_its_bound_keeps_its_bits(case, ratio, eps):
  grad, weight, axes = case
  limit = bound(weight, axes, ratio, eps)
  below = np.broadcast_to(norm(grad, axes) < limit * (1 - ROUNDING), grad.shape)
  actual = clip(grad, weight, ratio, eps)
  assert_same_bits(actual[below], grad[below])


@property_test
@given(cases(), ratios, epsilons)
def test_unit_above_its_bound_is_scaled_to_it(case, ratio, eps):
  grad, weight, axes = case
  size, limit = norm(grad, axes), bound(weight, axes, ratio, eps)
  above = np.broadcast_to(size > limit * (1 + ROUNDING), grad.shape)
  actual = clip(grad, weight, ratio, eps)
  desired = grad * (limit / np.maximum(size, 1e-30))
  np.testing.assert_allclose(
    actual[above], desired[above], rtol=ROUNDING, atol=SUBNORMAL
  )


@pytest.mark.slow
@property_test
@given(cases(), ratios, epsilons)
def test_second_pass_changes_nothing_beyond_rounding(case, ratio, eps):
  grad, weight, _ = case
  once = clip(grad, weight, ratio, eps)
  twice = clip(once, weight, ratio, eps)
  np.testing.assert_allclose(twice, once, rtol=ROUNDING, atol=SUBNORMAL)


@pytest.mark.slow
@property_test
@given(well_scaled(), ratios, floats(0.01, 100))
def test_scaling_gradient_and_weight_scales_the_update(case, ratio, factor):
  grad, weight = case
  factor = np.float32(factor)
  actual = clip(factor * grad, factor * weight, ratio)
  desired = factor * clip(grad, weight, ratio)
  np.testing.assert_allclose(actual, desired, rtol=ROUNDING)


@pytest.mark.slow
@property_test
@given(well_scaled(), ratios, st.integers(-6, 20))
def test_scaling_by_a_power_of_two_is_exact(case, ratio, power):
  grad, weight = case
  factor = np.float32(2.0**power)
  actual = clip(factor * grad, factor * weight, ratio)
  assert_same_bits(actual, factor * clip(grad, weight, ratio))


@pytest.mark.slow
@property_test
@given(well_scaled(), ratios, st.floats(1e-6, 0.5))
def test_eps_below_every_weight_norm_has_no_effect(case, ratio, eps):
  grad, weight = case
  assert_same_bits(clip(grad, weight, ratio, eps), clip(grad, weight, ratio))


@pytest.mark.slow
@property_test
@given(cases(anything, anything), floats(0, 10), floats(0, 1))
def test_equals_optax_on_any_float32(case, ratio, eps):
  grad, weight, axes = case
  if grad.ndim == 6:
    theirs = optax.adaptive_grad_clip(ratio, eps, axis=axes)
  else:
    theirs = optax.adaptive_grad_clip(ratio, eps)
  actual = clip(grad, weight, ratio, eps)
  desired, _ = run(theirs, grad, weight)
  # A NaN has many bit patterns.
  np.testing.assert_array_equal(np.isnan(actual), np.isnan(desired))
  numbers = ~np.isnan(desired)
  assert_same_bits(actual[numbers], desired[numbers])


@pytest.mark.slow
@property_test
@given(cases(), cases(), ratios, epsilons)
def test_fractions_count_the_units_at_or_above_their_bounds(a, b, ratio, eps):
  leaves = {'a': a, 'b': b}
  above = {}
  for name, (grad, weight, axes) in leaves.items():
    size, limit = norm(grad, axes), bound(weight, axes, ratio, eps)
    assume(np.all(np.abs(size - limit) > ROUNDING * limit))
    above[name] = (size > limit).ravel()
  tx = nfnet_jax.agc(ratio, eps, group_fn=lambda path: path)
  params = {name: weight for name, (_, weight, _) in leaves.items()}
  grads = {name: jnp.asarray(grad) for name, (grad, _, _) in leaves.items()}
  _, state = tx.update(grads, tx.init(params), params)
  shares = {
    name: share.item() for name, share in state.clipped_by_group.items()
  }
  mean = {name: units.mean(dtype=np.float32) for name, units in above.items()}
  assert shares == mean
  everything = np.concatenate(list(above.values()))
  assert state.clipped == everything.mean(dtype=np.float32)
