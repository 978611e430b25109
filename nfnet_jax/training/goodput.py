"""The share of a run's time, with all restarts, that made steps that count."""

from __future__ import annotations

import collections
from collections.abc import Sequence
import dataclasses
import json
import os
import time

from etils import epath

from nfnet_jax.storage import failures, files
from nfnet_jax.training import timing

FILE = 'time.jsonl'
# What the time since the first start went into, beside activities of `timing`.
# Steps count unless they were made again, after a stop without a checkpoint.
STEPS, REPEATED, STOPPED = 'steps', 'repeated steps', 'stopped'
_NAMES = {timing.DATA: 'waiting for data', timing.OTHER: 'starting and ending'}


@dataclasses.dataclass
class Start:
  """One start of a run: a row of `WORKDIR/time.jsonl`.

  Attributes:
    began: seconds since 1970.
    ended: when the row was written last.
    first_step: steps made before.
    step: steps made at `ended`.
    seconds: time per activity.
  """

  began: float
  ended: float
  first_step: int
  step: int
  seconds: dict[str, float]


class Goodput:
  """Records the time of this start in the workdir, and sums up all starts.

  Examples:
    >>> goodput = Goodput()
    >>> goodput.record(0)
    >>> sorted(goodput.shares())[-1]
    'time/waiting for data'
  """

  def __init__(
    self,
    workdir: str | os.PathLike = '',
    first_step: int = 0,
    stopwatch: timing.Stopwatch | None = None,
  ):
    """Read the earlier starts.

    Args:
      workdir: folder of the run; '' to keep no record.
      first_step: steps that the run had made.
      stopwatch: measures this start.
    """
    self._path = epath.Path(workdir) / FILE if workdir else None
    self._stopwatch = stopwatch or timing.Stopwatch()
    began = time.time() - self._stopwatch.total()
    self._earlier = read_starts(self._path) if self._path else []
    self._here = Start(began, began, first_step, first_step, {})

  def record(self, step: int, publish: bool = True) -> None:
    """Write the time so far; `step` steps have been made.

    Args:
      step: number of steps.
      publish: whether to write to a bucket too, which takes a request.
    """
    self._here.step = max(step, self._here.step)
    self._here.seconds = {
      activity: self._stopwatch.seconds(activity)
      for activity in timing.ACTIVITIES
    }
    self._here.ended = self._here.began + self._stopwatch.total()
    if self._path and (publish or not files.is_in_bucket(self._path)):
      rows = [dataclasses.asdict(s) for s in [*self._earlier, self._here]]
      text = ''.join(json.dumps(row) + '\n' for row in rows)
      files.write_atomically(self._path, text)

  def seconds(self) -> dict[str, float]:
    """Return what the time from the first start to the record went into."""
    here = [self._here] if self._here.seconds else []
    return account([*self._earlier, *here])

  def shares(self) -> dict[str, float]:
    """Return `goodput`, and the other shares as `time/NAME`."""
    seconds = self.seconds()
    total = sum(seconds.values()) or 1.0
    useful = seconds.pop(STEPS)
    shares = {f'time/{name}': value / total for name, value in seconds.items()}
    return {'goodput': useful / total, **shares}


def account(starts: Sequence[Start]) -> dict[str, float]:
  """Return the seconds of all starts, and between them, by what they went into.

  A killed process has no row for its last seconds: they count as `STOPPED`.

  Examples:
    >>> seconds = {timing.TRAINING: 8.0, timing.COMPILING: 2.0}
    >>> starts = [Start(0, 10, 0, 4, seconds), Start(15, 25, 3, 7, seconds)]
    >>> spent = account(starts)
    >>> spent['steps'], spent['repeated steps'], spent['stopped']
    (14.0, 2.0, 5.0)
    >>> spent['compiling']
    4.0
  """
  spent: dict[str, float] = collections.defaultdict(float)
  spent |= dict.fromkeys((STEPS, REPEATED, STOPPED), 0.0)
  for start, following in zip(starts, [*starts[1:], None]):
    for activity in timing.ACTIVITIES:
      if activity != timing.TRAINING:
        name = _NAMES.get(activity, activity)
        spent[name] += start.seconds.get(activity, 0.0)
    made = kept = start.step - start.first_step
    if following:
      kept = min(max(following.first_step - start.first_step, 0), made)
      spent[STOPPED] += max(following.began - start.ended, 0)
    training = start.seconds.get(timing.TRAINING, 0.0)
    useful = training * kept / made if made else training
    spent[STEPS] += useful
    spent[REPEATED] += training - useful
  return dict(spent)


def read_starts(path: str | os.PathLike) -> list[Start]:
  """Return the rows of a `time.jsonl`; none if it is missing or damaged.

  Raises:
    OSError: if the file exists but cannot be read.
  """
  file = epath.Path(path)
  text = failures.read(
    f'Reading {file}', lambda: file.read_bytes() if file.exists() else b''
  )
  try:
    starts = [Start(**json.loads(line)) for line in text.splitlines()]
    account(starts)
  except (AttributeError, TypeError, ValueError):
    return []
  return starts
