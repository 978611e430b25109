"""Where the time of a run goes, and how many images a second that makes."""

import collections
from collections.abc import Iterator
import contextlib
import time

# What a run spends its time on. Waiting for a batch while the devices may still
# work is `DATA`; to restore, to fill the pipeline and to close it is `OTHER`.
TRAINING, DATA, COMPILING, EVALUATING, SAVING, OTHER = (
  'training',
  'data',
  'compiling',
  'evaluating',
  'saving',
  'other',
)


class Stopwatch:
  """Measures for how long a run does what; no second counts twice.

  Example:
    >>> watch = Stopwatch()
    >>> with watch.during(TRAINING):
    ...   with watch.during(SAVING):
    ...     pass
    >>> watch.seconds(TRAINING) < watch.total()
    True
  """

  def __init__(self):
    self._seconds = collections.Counter()
    self._doing = OTHER
    self._since = time.perf_counter()

  @contextlib.contextmanager
  def during(self, doing: str) -> Iterator[None]:
    """Counts what happens inside as this, and as nothing else."""
    before = self._switch(doing)
    try:
      yield
    finally:
      self._switch(before)

  def seconds(self, *doings: str) -> float:
    """Returns the time spent on these so far."""
    self._switch(self._doing)
    return sum(self._seconds[doing] for doing in doings)

  def total(self) -> float:
    """Returns the time since the start."""
    self._switch(self._doing)
    return sum(self._seconds.values())

  def _switch(self, doing: str) -> str:
    now, before = time.perf_counter(), self._doing
    self._seconds[before] += now - self._since
    self._doing, self._since = doing, now
    return before


class Throughput:
  """Counts images a second, and the share of that time spent on waiting.

  Neither evaluations nor checkpoints nor the first step, which compiles, count.

  Attributes:
    batch_size: images a step, over all devices.
    steps: finished so far, the first one included.

  Example:
    >>> Throughput(Stopwatch(), batch_size=64).overall()
    {}
  """

  def __init__(self, watch: Stopwatch, batch_size: int):
    self.batch_size = batch_size
    self.steps = 0
    self._watch = watch
    self._lap = 0, 0.0, 0.0

  def lap(self) -> dict[str, float]:
    """Returns what `overall` does, of the time since the last call."""
    before, self._lap = self._lap, self._now()
    return self._rates(*(now - then for now, then in zip(self._lap, before)))

  def overall(self) -> dict[str, float]:
    """Returns `images_per_second` and `data_wait`, the share of the wait.

    Nothing if no step was timed.
    """
    return self._rates(*self._now())

  def _now(self) -> tuple[int, float, float]:
    waited = self._watch.seconds(DATA)
    seconds = waited + self._watch.seconds(TRAINING)
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
