"""The search for the largest batch that fits."""

from hypothesis import given
from hypothesis import strategies as st

from nfnet_jax.planning import largest_batch


@given(
  st.integers(1, 300), st.integers(0, 5000), st.integers(1, 100), st.data()
)
def test_finds_the_largest_if_memory_is_affine(batch, base, each, data):
  needed = lambda size: base + each * size
  available = data.draw(st.integers(0, needed(batch) - 1))
  seen = []

  def measure(size):
    seen.append(size)
    return needed(size)

  largest, tried = largest_batch.largest_batch(
    batch, needed(batch), available, measure
  )
  best = max((s for s in range(1, batch) if needed(s) <= available), default=0)
  assert largest == best
  assert tried == seen
  assert len(tried) <= 3


@given(st.integers(2, 200), st.integers(1, 200), st.integers(0, 40))
def test_the_result_was_compiled_and_fits(batch, available, bend):
  needed = lambda size: size + bend * (size > 7)
  if needed(batch) <= available:
    return
  largest, tried = largest_batch.largest_batch(
    batch, needed(batch), available, needed
  )
  assert largest == 0 or (largest in tried and needed(largest) <= available)
  assert all(0 < size < batch for size in tried)
  assert len(tried) <= 6
