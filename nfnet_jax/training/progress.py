"""Shows a run's progress: a bar on a terminal, plain lines elsewhere."""

from collections.abc import Mapping
import sys
import time
from typing import TextIO

import tqdm


class Progress:
  """Reports loss, accuracy, rate, the time spent on data, and time left.

  `data` is the share of the time in which the host waited for the next batch.
  The devices work on meanwhile; near 100 % they starve.

  Example:
    >>> with Progress(first_step=0, total_steps=100, batch_size=64) as progress:
    ...   progress.update(10, {'loss': 2.3, 'top1': 0.1})
  """

  def __init__(
    self,
    first_step: int,
    total_steps: int,
    batch_size: int,
    stream: TextIO | None = None,
  ):
    self._stream = stream or sys.stderr
    self._total = total_steps
    self._batch_size = batch_size
    self._step = first_step
    self._seconds = 0.0
    self._waited = 0.0
    self._resumed_at = None
    self._rate = 0.0
    self._untimed_steps = 1  # The first one, which compiles.
    self._bar = tqdm.tqdm(
      total=total_steps,
      initial=first_step,
      bar_format='{percentage:3.0f}%|{bar}| {n}/{total}{postfix}',
      file=self._stream,
      disable=not self._stream.isatty(),
      dynamic_ncols=True,
    )

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *error) -> None:
    self._bar.close()

  def resume(self) -> None:
    """Starts the clock, which stands while the first step compiles."""
    if self._resumed_at is None:
      self._resumed_at = time.perf_counter()

  def pause(self) -> None:
    """Stops the clock, as for an evaluation."""
    if self._resumed_at is not None:
      self._seconds += time.perf_counter() - self._resumed_at
      self._resumed_at = None

  def waited(self, seconds: float) -> None:
    """Notes how long the host waited for a batch."""
    if self._resumed_at is not None:
      self._waited += seconds

  def update(self, step: int, row: Mapping[str, float]) -> None:
    """Shows the metrics of a step, and the rate since the last call."""
    self.pause()
    steps = step - self._step
    timed, self._untimed_steps = steps - self._untimed_steps, 0
    if timed > 0 and self._seconds > 0:
      self._rate = timed * self._batch_size / self._seconds
    wait = self._waited / self._seconds if self._seconds else 0.0
    self._step, self._seconds, self._waited = step, 0.0, 0.0
    shown = {
      'loss': f'{row["loss"]:.3f}',
      'top1': f'{100 * row["top1"]:.1f}%',
      'img/s': f'{self._rate:.0f}',
      'data': f'{100 * wait:.0f}%',
    }
    if 'clipped' in row:
      shown['clipped'] = f'{100 * row["clipped"]:.1f}%'
    shown['eta'] = self._time_left()
    if self._bar.disable:
      self.note(
        f'step {step}/{self._total}  '
        + '  '.join(f'{name} {value}' for name, value in shown.items())
      )
    else:
      self._bar.set_postfix(shown, refresh=False)
      self._bar.update(steps)
    self.resume()

  def note(self, line: str) -> None:
    """Writes a line beside the bar."""
    self._bar.write(line, file=self._stream)
    self._stream.flush()

  def _time_left(self) -> str:
    if not self._rate:
      return '?'
    seconds = (self._total - self._step) * self._batch_size / self._rate
    return tqdm.tqdm.format_interval(seconds)
