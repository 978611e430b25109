"""When a step's collectives run, and how much of them computation hides.

Times are cycles since the start of the step. Links are busy with one transfer
at a time. A transfer that has not ended when its result is needed delays all
that follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import dataclasses
import functools
import re

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
    30.0
  """
  sent = sending(transfers, cycles_per_byte)
  return max([0.0, *(end - each.end for each, _, end in sent)])


def sending(
  transfers: Iterable[Transfer], cycles_per_byte: float
) -> Iterator[tuple[Transfer, float, float]]:
  """Yield transfers in the order of sending, and when each begins and ends.

  Args:
    transfers: in any order.
    cycles_per_byte: cycles in which a device sends a byte.
  """
  end = delay = 0.0
  for each in sorted(transfers, key=lambda each: (each.begin, each.end)):
    begin = max(end, each.begin + delay)
    end = begin + each.sent * cycles_per_byte
    delay = max(delay, end - each.end)
    yield each, begin, end


@dataclasses.dataclass(frozen=True)
class _Collective:
  """A collective, and the operations of the main computation that need it.

  Attributes:
    op: the collective itself, which may lie inside a fusion.
    given: names of what it sends.
    begin: the operation that begins it.
    end: the operation that gives its result, which is `begin` if the step waits
      for it.
  """

  op: hlo.Op
  given: tuple[str, ...]
  begin: hlo.Op
  end: hlo.Op


class _Reader:
  """Reads the transfers of a program's main computation."""

  def __init__(self, program: hlo.Program, devices: int):
    self._program = program
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
    found = self._collectives()
    return Overlap(
      scheduled=tuple(self._scheduled(each) for each in found),
      possible=tuple(part for each in found for part in self._possible(each)),
      cycles=self._total,
    )

  def _collectives(self) -> list[_Collective]:
    ends = {}
    for op in self._ops.values():
      ended = costs.ended_by(self._program, op)
      if ended:
        ends[_chain(ended)] = op
    found = []
    for op in self._ops.values():
      begun = costs.begun_by(self._program, op)
      if not begun:
        continue
      given, end = op.operands, op
      if begun is not op:
        given = self._given_to(op, begun)
      if op.opcode.endswith('-start'):
        end = self._ops[self._users[op.name][0]]
      elif begun is not op:
        end = ends.get(_chain(begun), op)
      found.append(_Collective(begun, given, op, end))
    return found

  def _given_to(self, outer: hlo.Op, inner: hlo.Op) -> tuple[str, ...]:
    """Return what an operation gives to a collective inside it."""
    inside = {each.name: each for each in self._program.inside(outer)}
    given = []
    for name in inner.operands:
      op = inside[name]
      while op.opcode != 'parameter':
        op = inside[op.operands[0]]
      given.append(outer.operands[int(op.operands[0])])
    return tuple(given)

  def _scheduled(self, each: _Collective) -> Transfer:
    sent = sum(self._sent(each, name) for name in each.given)
    begin, end = (self._times[op.name][0] for op in (each.begin, each.end))
    return Transfer(each.op.op_name, begin, end, sent)

  def _possible(self, each: _Collective) -> list[Transfer]:
    """Return a transfer for each array that a collective sends."""
    parts = {
      self._ops[user].attribute('index'): user
      for user in self._users.get(each.end.name, [])
      if self._ops[user].opcode == 'get-tuple-element'
    }
    transfers = []
    for index, name in enumerate(each.given):
      begin = self._ready(name)
      end = self._needed(parts.get(str(index), each.end.name))
      path = self._producer(name).op_name
      transfers.append(
        Transfer(path, begin, max(begin, end), self._sent(each, name))
      )
    return transfers

  def _sent(self, each: _Collective, name: str) -> float:
    size = hlo.num_bytes(self._ops[name].shape)
    return size * costs.traffic(each.op, self._devices)

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


def _chain(collective: hlo.Op) -> str:
  """Return what the beginning and the end of a fused collective share."""
  found = re.search(r'chain_id="(\d+)"', collective.rest)
  return found[1] if found else ''
