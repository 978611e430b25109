"""Ending a run on SIGTERM or Ctrl-C without losing a step."""

import itertools
import os
import signal

from jax.experimental import multihost_utils

from nfnet_jax.distributed import processes


class Interrupted(Exception):
  """The run was asked to stop; what raises it to the caller has saved."""


class StopRequest:
  """Notes SIGTERM and SIGINT, so that the loop can stop between two steps.

  A second SIGINT acts at once, as usual. Of several processes any may be asked;
  all of them learn it at the same poll.

  Example:
    >>> with StopRequest() as stop:
    ...   while not stop.poll():
    ...     break
  """

  def __init__(self):
    self._requested = False
    self._previous = {}
    # Several processes agree on a number yet to come, so that one counter must
    # go on through steps and evaluations alike.
    self._polls = itertools.count(1)

  def __enter__(self) -> 'StopRequest':
    self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._note)
    if not processes.are_several():  # JAX notes it.
      self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, *error) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def poll(self) -> bool:
    """Whether to stop here; to be called equally often by all processes."""
    if processes.are_several():
      return multihost_utils.reached_preemption_sync_point(next(self._polls))
    return self._requested

  def _note(self, number: int, frame) -> None:
    del frame
    self._requested = True
    if number == signal.SIGINT:
      signal.signal(number, self._previous[number])
      if processes.are_several():
        os.kill(os.getpid(), signal.SIGTERM)
