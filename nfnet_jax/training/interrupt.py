"""Ending a run on SIGTERM or Ctrl-C without losing a step."""

import signal


class Interrupted(Exception):
  """The run was asked to stop; what raises it to the caller has saved."""


class StopRequest:
  """Notes SIGTERM and SIGINT, so that the loop can stop between two steps.

  A second SIGINT acts at once, as usual.

  Example:
    >>> with StopRequest() as stop:
    ...   while not stop.requested:
    ...     break
  """

  def __init__(self):
    self.requested = False
    self._previous = {}

  def __enter__(self) -> 'StopRequest':
    for number in (signal.SIGTERM, signal.SIGINT):
      self._previous[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *error) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame) -> None:
    del frame
    self.requested = True
    if number == signal.SIGINT:
      signal.signal(number, self._previous[number])
