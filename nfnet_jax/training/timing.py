"""Time that a run spends per activity, and images per second."""

from __future__ import annotations

import collections
from collections.abc import Iterator
import contextlib
import time

# Activities of a run. `DATA` is waiting for a batch, while the devices may
# still compute; `OTHER` is starting the command, restoring, and starting and
# closing the data pipeline.
ACTIVITIES = TRAINING, DATA, COMPILING, EVALUATING, SAVING, OTHER = (
  'training',
  'data',
  'compiling',
  'evaluating',
  'saving',
  'other',
)


class Stopwatch:
  """Measures the time per activity; each second counts for one activity.

  Examples:
    >>> stopwatch = Stopwatch()
    >>> with stopwatch.during(TRAINING):
    ...   with stopwatch.during(SAVING):
    ...     pass
    >>> stopwatch.seconds(TRAINING) < stopwatch.total()
    True
  """

  def __init__(self) -> None:
    self._seconds: dict[str, float] = collections.defaultdict(float)
    self._activity = OTHER
    self._since = time.perf_counter()

  @contextlib.contextmanager
  def during(self, activity: str) -> Iterator[None]:
    """Count the time inside the context for this activity only."""
    before = self._switch(activity)
    try:
      yield
    finally:
      self._switch(before)

  def seconds(self, *activities: str) -> float:
    """Return the time spent on these activities so far."""
    self._switch(self._activity)
    return sum(self._seconds[activity] for activity in activities)

  def total(self) -> float:
    """Return the time since the start."""
    self._switch(self._activity)
    return sum(self._seconds.values())

  def _switch(self, activity: str) -> str:
    now, before = time.perf_counter(), self._activity
    self._seconds[before] += now - self._since
    self._activity, self._since = activity, now
    return before


class Throughput:
  """Measures images per second, and the share of time spent waiting for data.

  Evaluations, checkpoints and the first step, which compiles, do not count.

  Attributes:
    batch_size: images per step, over all devices.
    steps: number of steps finished so far, the first one included.

  Examples:
    >>> Throughput(Stopwatch(), batch_size=64).overall()
    {}
  """

  def __init__(self, stopwatch: Stopwatch, batch_size: int):
    self.batch_size = batch_size
    self.steps = 0
    self._stopwatch = stopwatch
    self._last = (0, 0.0, 0.0)

  def lap(self) -> dict[str, float]:
    """Return the values of `overall` for the time since the last call."""
    last, self._last = self._last, self._now()
    (steps, seconds, waited), now = last, self._last
    return self._rates(now[0] - steps, now[1] - seconds, now[2] - waited)

  def overall(self) -> dict[str, float]:
    """Return `images_per_second` and `data_wait`, the share of waiting time.

    The dictionary is empty if no step was timed.
    """
    return self._rates(*self._now())

  def _now(self) -> tuple[int, float, float]:
    """Return timed steps, their seconds, and the seconds of waiting so far."""
    waited = self._stopwatch.seconds(DATA)
    seconds = waited + self._stopwatch.seconds(TRAINING)
    return max(self.steps - 1, 0), seconds, waited

  def _rates(
    self, steps: int, seconds: float, waited: float
  ) -> dict[str, float]:
    if not steps:
      return {}
    return {
      'images_per_second': steps * self.batch_size / seconds,
      'data_wait': waited / seconds,
    }
