"""Durations in steps, epochs or examples."""

from __future__ import annotations

import dataclasses
import math
import re

_DURATION = re.compile(
  r'\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*(step|epoch|example)s?\s*'
)


def parse(duration: str) -> tuple[float, str]:
  """Return the amount and the unit of a duration.

  Raises:
    ValueError: if it is not a duration.

  Examples:
    >>> parse('5 epochs')
    (5.0, 'epoch')
  """
  match = _DURATION.fullmatch(str(duration))
  if not match:
    raise ValueError(
      f"'{duration}' is not a duration; write '100 steps', '5 epochs' or "
      "'1e6 examples'."
    )
  if math.isinf(amount := float(match[1])):
    raise ValueError(f"'{duration}' is too long.")
  return amount, match[2]


@dataclasses.dataclass(frozen=True)
class Units:
  """Conversion of durations to steps.

  Attributes:
    batch_size: examples per step.
    examples: per epoch.

  Examples:
    >>> Units(batch_size=4096, examples=1_281_167).steps('5 epochs')
    1563.924560546875
  """

  batch_size: int
  examples: float

  def steps(self, duration: str) -> float:
    """Return a duration as a number of steps, which may be fractional.

    Raises:
      ValueError: if it is not a duration.
    """
    amount, unit = parse(duration)
    sizes = {'step': self.batch_size, 'epoch': self.examples, 'example': 1}
    return amount * sizes[unit] / self.batch_size
