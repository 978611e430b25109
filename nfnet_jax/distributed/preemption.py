"""Stopping a run on SIGTERM or Ctrl-C without losing a step."""

from __future__ import annotations

from collections.abc import Callable
import itertools
import os
import signal
import types
from typing import Any

from jax.experimental import multihost_utils

from nfnet_jax.distributed import processes


class Interrupted(Exception):
  """The run was asked to stop, and its state was saved."""


class StopRequest:
  """Record SIGTERM and SIGINT, so that the loop can stop between two steps.

  A second SIGINT interrupts at once, as Python does by default. With several
  processes any of them may get the signal; all of them see it at the same poll.

  Examples:
    >>> with StopRequest() as stop:
    ...   while not stop.poll():
    ...     break
  """

  def __init__(self):
    self._requested = False
    self._previous: dict[int, Callable[..., Any] | int | None] = {}
    # Several processes agree on the number of a future poll, so one counter
    # has to run through training and evaluation.
    self._polls = itertools.count(1)

  def __enter__(self) -> StopRequest:
    """Install the signal handlers."""
    self._handle(signal.SIGINT)
    if not processes.are_several():  # Else JAX handles SIGTERM.
      self._handle(signal.SIGTERM)
    return self

  def _handle(self, number: int) -> None:
    self._previous[number] = signal.signal(number, self._on_signal)

  def __exit__(self, *exc_info: Any) -> None:
    """Restore the previous signal handlers."""
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def poll(self) -> bool:
    """Return whether to stop here; all processes must call it equally often."""
    if processes.are_several():
      return multihost_utils.reached_preemption_sync_point(next(self._polls))
    return self._requested

  def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
    del frame
    self._requested = True
    if number == signal.SIGINT:
      signal.signal(number, self._previous[number])
      if processes.are_several():
        os.kill(os.getpid(), signal.SIGTERM)
