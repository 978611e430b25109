"""Finds the largest batch that fits, in as few compilations as may be."""

from collections.abc import Callable

# Compilations at most; two or three are the rule.
_TRIES = 6


def largest_batch(
  batch: int, needed: int, available: int, measure: Callable[[int], int]
) -> tuple[int, list[int]]:
  """Searches below a batch that does not fit.

  Memory is almost affine in the batch: the line through the sizes next to the
  limit, or the first and the last if all are too large, gives the next one to
  compile, until it ends at a size that was seen to fit.

  Args:
    batch: examples a device that do not fit.
    needed: bytes that they need.
    available: bytes that a device has.
    measure: examples a device -> bytes needed, by compiling.

  Returns:
    The largest batch that was seen to fit, 0 for none; and all that were tried.

  Example:
    >>> largest_batch(32, 330, 200, measure=lambda batch: 10 + 10 * batch)
    (19, [16, 19])
  """
  sizes = {batch: needed}
  fitting, failing, guess = 0, batch, batch // 2
  while fitting < guess < failing and len(sizes) <= _TRIES:
    sizes[guess] = measure(guess)
    if sizes[guess] <= available:
      fitting = guess
    else:
      failing = guess
    # A long line: two sizes side by side may differ by their padding alone.
    ends = (fitting or failing, failing if fitting else batch)
    end = _line_end(sizes, *ends, available)
    guess = max(end, 1)
  return fitting, list(sizes)[1:]


def _line_end(sizes: dict[int, int], x: int, y: int, available: int) -> int:
  """Returns where the line through two sizes meets the limit."""
  slope = (sizes[y] - sizes[x]) / (y - x)
  return int(x + (available - sizes[x]) / slope) if slope > 0 else x // 2
