"""When a step's collectives run, and how much of them computation hides.

Times are cycles since the start of the step. Links are busy with one transfer
at a time. A transfer that has not ended when its result is needed delays all
that follows.
"""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import functools

from nfnet_jax.planning import costs, hlo

# Operations that only give another name to a value.
_ALIASES = ('bitcast', 'get-tuple-element', 'tuple')


@dataclasses.dataclass(frozen=True)
class Transfer:
  """Bytes that are sent while the step computes.

  Attributes:
    name: path of the operation that computes what is sent, or ''.
    begin: when sending can begin.
    end: when the result is needed; `begin` if the step waits for it.
    sent: bytes that each device sends.
  """

  name: str
  begin: int
  end: int
  sent: float


@dataclasses.dataclass(frozen=True)
class Overlap:
  """The transfers of a step.

  Attributes:
    scheduled: one for each collective, where the compiler has put it.
    possible: one for each array that the collectives send, from when it is
      computed until its sum, or the whole of it, is first used.
    cycles: of the whole step.
  """

  scheduled: tuple[Transfer, ...]
  possible: tuple[Transfer, ...]
  cycles: int


def read(text: str, devices: int) -> Overlap:
  """Find the transfers in the text of a compiled step.

  Args:
    text: the result of `compiled.as_text()`.
    devices: number of devices that run the step together.
  """
  return _Reader(hlo.parse(text), devices).overlap()


def waiting(transfers: Iterable[Transfer], cycles_per_byte: float) -> float:
  """Return the cycles for which a step waits for its transfers.

  Args:
    transfers: in any order.
    cycles_per_byte: cycles in which a device sends a byte.

  Examples:
    >>> waiting([Transfer('', begin=10, end=30, sent=50)], cycles_per_byte=1)
    30
  """
  free = delay = 0.0
  for each in sorted(transfers, key=lambda each: (each.begin, each.end)):
    free = max(free, each.begin + delay) + each.sent * cycles_per_byte
    delay += max(0, free - each.end - delay)
  return delay


class _Reader:
  """Reads the transfers of a program's main computation."""

  def __init__(self, program: hlo.Program, devices: int):
    self._devices = devices
    self._ops = program.computations[program.entry].ops
    self._times = program.timeline()
    self._total = max(end for _, end in self._times.values())
    self._users: dict[str, list[str]] = {}
    for op in self._ops.values():
      for name in op.operands:
        self._users.setdefault(name, []).append(op.name)
    self._ready = functools.cache(self._find_ready)
    self._needed = functools.cache(self._find_needed)

  def overlap(self) -> Overlap:
    found = [
      op for op in self._ops.values() if costs.traffic(op, self._devices)
    ]
    return Overlap(
      scheduled=tuple(self._scheduled(op) for op in found),
      possible=tuple(each for op in found for each in self._possible(op)),
      cycles=self._total,
    )

  def _scheduled(self, op: hlo.Op) -> Transfer:
    begin, _ = self._times[op.name]
    end = begin
    if op.opcode.endswith('-start'):
      end = min(self._times[name][0] for name in self._users[op.name])
    sent = sum(self._sent(op, name) for name in op.operands)
    return Transfer(op.op_name, begin, end, sent)

  def _possible(self, op: hlo.Op) -> list[Transfer]:
    """Return a transfer for each operand of a collective."""
    result = op
    if op.opcode.endswith('-start'):
      result = self._ops[self._users[op.name][0]]
    parts = {
      self._ops[user].attribute('index'): user
      for user in self._users.get(result.name, [])
      if self._ops[user].opcode == 'get-tuple-element'
    }
    transfers = []
    for index, name in enumerate(op.operands):
      begin = self._ready(name)
      end = self._needed(parts.get(str(index), result.name))
      path = self._producer(name).op_name
      transfers.append(
        Transfer(path, begin, max(begin, end), self._sent(op, name))
      )
    return transfers

  def _sent(self, op: hlo.Op, operand: str) -> float:
    size = hlo.num_bytes(self._ops[operand].shape)
    return size * costs.traffic(op, self._devices)

  def _producer(self, name: str) -> hlo.Op:
    op = self._ops[name]
    while op.opcode in _ALIASES and op.operands:
      op = self._ops[op.operands[0]]
    return op

  def _find_ready(self, name: str) -> int:
    op = self._ops[name]
    if op.opcode in _ALIASES:
      return max(map(self._ready, op.operands), default=0)
    return self._times[name][1]

  def _find_needed(self, name: str) -> int:
    """Return when a value is first used; the end of the step if never."""
    uses = [
      self._needed(user)
      if self._ops[user].opcode in _ALIASES
      else self._times[user][0]
      for user in self._users.get(name, [])
    ]
    return min(uses, default=self._total)
