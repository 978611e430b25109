"""The command `train`, which also appends its phases to the file `PHASES`.

Each line is the time in seconds since 1970 and the phase that begins. Phases
are those of `timing`, with 'starting' and 'ending' in place of 'other'.
"""

import contextlib
import os
import pathlib
import time

from nfnet_jax.cli import command
from nfnet_jax.experiments import train
from nfnet_jax.training import timing


class TracedStopwatch(timing.Stopwatch):
  """A stopwatch that writes down when an activity begins."""

  def __init__(self):
    super().__init__()
    self._path = pathlib.Path(os.environ['PHASES'])
    self._stack = ['starting']
    self._write()

  def _write(self) -> None:
    with self._path.open('a') as file:
      file.write(f'{time.time()} {self._stack[-1]}\n')

  @contextlib.contextmanager
  def during(self, activity: str):
    """Count the time inside the context for this activity only."""
    if activity == timing.TRAINING:
      self._stack[0] = 'ending'
    self._stack.append('starting' if activity == timing.OTHER else activity)
    self._write()
    try:
      with super().during(activity):
        yield
    finally:
      self._stack.pop()
      self._write()


if __name__ == '__main__':
  timing.Stopwatch = TracedStopwatch
  command.run(train.main)
