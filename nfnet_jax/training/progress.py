"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
import sys
from typing import Any, TextIO

import tqdm


class Progress:
  """Reports loss, accuracy, images per second, data wait and remaining time.

  `data` is the share of time in which the host waits for the next batch. The
  devices compute in the meantime; near 100 %, they wait for data too.

  Examples:
    >>> with Progress(first_step=0, total_steps=100, batch_size=64) as progress:
    ...   progress.update(10, {'loss': 2.3, 'top1': 0.1})
  """

  def __init__(
    self,
    first_step: int,
    total_steps: int,
    batch_size: int,
    stream: TextIO | None = None,
    *,
    devices: int = 1,
  ):
    """Start at a step.

    Args:
      first_step: number of steps made before this start.
      total_steps: number of steps of the whole run.
      batch_size: images per step, over all devices.
      stream: where to write; standard error by default.
      devices: number of devices; if there are several, images per second are
        also reported per device.
    """
    self._stream = stream or sys.stderr
    self._total = total_steps
    self._batch_size = batch_size
    self._devices = devices
    self._step = first_step
    self._rate = 0.0
    self._bar = tqdm.tqdm(
      total=total_steps,
      initial=first_step,
      bar_format='{percentage:3.0f}%|{bar}| {n}/{total}{postfix}',
      file=self._stream,
      disable=not self._stream.isatty(),
      dynamic_ncols=True,
    )

  def __enter__(self) -> Progress:
    return self

  def __exit__(self, *error: Any) -> None:
    self._bar.close()

  def update(self, step: int, row: Mapping[str, float]) -> None:
    """Show the metrics of a step, with those of `timing.Throughput.lap`."""
    self._rate = row.get('images_per_second', self._rate)
    per_device = self._rate / self._devices
    shown = {
      'loss': f'{row["loss"]:.3f}',
      'top1': f'{100 * row["top1"]:.1f}%',
      'img/s': f'{self._rate:.0f}'
      + (f' ({per_device:.0f} per device)' if self._devices > 1 else ''),
      'data': f'{100 * row.get("data_wait", 0):.0f}%',
    }
    if 'clipped' in row:
      shown['clipped'] = f'{100 * row["clipped"]:.1f}%'
    shown['eta'] = self._time_left(step)
    if self._bar.disable:
      self.log(
        f'step {step}/{self._total}  '
        + '  '.join(f'{name} {value}' for name, value in shown.items())
      )
    else:
      self._bar.set_postfix(shown, refresh=False)
      self._bar.update(step - self._step)
    self._step = step

  def log(self, line: str) -> None:
    """Write a line above the bar."""
    self._bar.write(line, file=self._stream)
    self._stream.flush()

  def _time_left(self, step: int) -> str:
    if not self._rate:
      return '?'
    seconds = (self._total - step) * self._batch_size / self._rate
    return tqdm.tqdm.format_interval(seconds)
