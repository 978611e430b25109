"""Finds the largest batch that fits, in as few compilations as may be."""

from collections.abc import Callable

# Compilations at most; two or three are the rule.
_TRIES = 6


def largest_batch(
  batch: int, needed: int, available: int, measure: Callable[[int], int]
) -> tuple[int, list[int]]:
  """Searches below a batch that does not fit.

  Memory is almost affine in the batch: the line through the last two sizes
  gives the next one to compile, until it ends at a size that was seen to fit.

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
    end = _line_end(sizes, available)
    if end is None:
      end = (fitting + failing) // 2
    guess = min(max(end, 1), failing - 1)
  return fitting, list(sizes)[1:]


def _line_end(sizes: dict[int, int], available: int) -> int | None:
  """Returns where the line through the last two sizes meets the limit."""
  (x, first), (y, second) = list(sizes.items())[-2:]
  slope = (first - second) / (x - y)
  return int(y + (available - second) / slope) if slope > 0 else None
