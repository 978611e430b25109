"""Find the largest batch that fits, with as few compilations as possible."""

from __future__ import annotations

from collections.abc import Callable

# Usually two or three compilations are enough.
_MAX_COMPILATIONS = 6


def largest_batch(
  batch: int, needed: int, available: int, measure: Callable[[int], int]
) -> tuple[int, list[int]]:
  """Search for the largest batch below one that does not fit.

  Memory is almost affine in the batch size. The next size to compile is where
  a line meets the limit: the line through the largest size that fits and the
  smallest that does not, or, while none fits, through the first and the last.
  The search ends when the line leads to no new size between these two.

  Args:
    batch: examples per device that do not fit.
    needed: bytes that they need.
    available: bytes that a device has.
    measure: maps examples per device to the bytes needed, by compiling.

  Returns:
    The largest batch that was compiled and fits, or 0; and all batches that
    were compiled.

  Examples:
    >>> largest_batch(32, 330, 200, measure=lambda batch: 10 + 10 * batch)
    (19, [16, 19])
  """
  sizes = {batch: needed}
  fitting, failing, guess = 0, batch, batch // 2
  while fitting < guess < failing and len(sizes) <= _MAX_COMPILATIONS:
    sizes[guess] = measure(guess)
    if sizes[guess] <= available:
      fitting = guess
    else:
      failing = guess
    # The points are far apart: neighbouring sizes may differ only by padding.
    ends = (fitting or failing, failing if fitting else batch)
    end = _line_end(sizes, *ends, available)
    guess = max(end, 1)
  return fitting, list(sizes)[1:]


def _line_end(sizes: dict[int, int], x: int, y: int, available: int) -> int:
  """Return the batch at which the line through two sizes meets the limit."""
  slope = (sizes[y] - sizes[x]) / (y - x)
  return int(x + (available - sizes[x]) / slope) if slope > 0 else x // 2
