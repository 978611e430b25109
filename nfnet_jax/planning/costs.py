"""The compiler's own estimate of a step's cost, by category."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import math
import re

from nfnet_jax.planning import hlo

# Operations that only move data.
_MOVES = {
  'bitcast',
  'concatenate',
  'constant',
  'copy',
  'get-tuple-element',
  'pad',
  'parameter',
  'reshape',
  'reverse',
  'slice',
  'transpose',
  'tuple',
}
# Collective -> bytes that each of n devices sends per byte of payload.
_TRAFFIC: dict[str, Callable[[int], float]] = {
  'all-reduce': lambda n: 2 * (n - 1) / n,
  'all-gather': lambda n: (n - 1) / n,
  'reduce-scatter': lambda n: (n - 1) / n,
  'all-to-all': lambda n: (n - 1) / n,
  'collective-permute': lambda n: 1.0,
}
# A scope in an operation's path -> its category; the first match counts.
_KINDS = {
  'agc': 'AGC',
  'update': 'optimiser and EMA',
  'standardize': 'weight standardisation',
  'squeeze_excite': 'squeeze-excite',
  'batch_norm': 'batch normalisation',
  'cast': 'casts of parameters and gradients',
}
_PLACE = re.compile(r'stem|stage_\d+|head|linear')
_ORDER = (
  *_KINDS.values(),
  'elementwise and pooling',
  'copies',
  'loss and the rest',
)


@dataclasses.dataclass(frozen=True)
class Category:
  """The cycles of a step that serve one purpose.

  Attributes:
    name: such as 'convolutions, stage 2'.
    forward: cycles of everything but the backward pass.
    backward: cycles of the backward pass.
  """

  name: str
  forward: int
  backward: int

  @property
  def cycles(self) -> int:
    """Cycles of both passes."""
    return self.forward + self.backward


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of one kind in a step.

  Attributes:
    name: XLA's name, such as 'all-reduce'.
    count: collectives per step.
    payload: bytes of the complete arrays that are reduced or gathered.
    sent: lower bound of the bytes that each device sends.
  """

  name: str
  count: int
  payload: int
  sent: float


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The compiler's estimate of a step, per device.

  Attributes:
    cycles: sum over the scheduled operations, loop bodies times their trip
      count. Collectives, asynchronous copies and scalar work have no estimate.
    categories: the cycles by purpose.
    collectives: the communication between devices.
    unknown_loops: loops that count once, because their trip count is unknown.
    not_estimated: convolutions and others that count as 0, because the compiler
      has no estimate for them.
  """

  cycles: int
  categories: Sequence[Category]
  collectives: Sequence[Collective]
  unknown_loops: int
  not_estimated: int = 0


def read(text: str, devices: int) -> Schedule:
  """Read the estimate from the text of a compiled step.

  Args:
    text: the result of `compiled.as_text()`.
    devices: number of devices that run the step together.
  """
  program = hlo.parse(text)
  cycles: dict[str, list[int]] = {}
  for op, times in program.walk():
    if op.cycles:
      name, is_backward = attribute(program, op)
      cycles.setdefault(name, [0, 0])[is_backward] += op.cycles * times
  categories = [Category(name, *passes) for name, passes in cycles.items()]
  return Schedule(
    cycles=sum(category.cycles for category in categories),
    categories=sorted(categories, key=_order),
    collectives=collectives(program, devices),
    unknown_loops=program.unknown_loops(),
    not_estimated=sum(op.lacks_estimate for op, _ in program.walk()),
  )


def attribute(program: hlo.Program, op: hlo.Op) -> tuple[str, bool]:
  """Return an operation's category, and whether it is in the backward pass.

  A fusion that contains a convolution counts as this convolution. Any other
  fusion has the category of its result. If the result has no scope, as a
  selection between old and new parameters, the operations inside decide.
  """
  inner = list(program.inside(op))
  convolutions = [each for each in inner if each.opcode == 'convolution']
  candidates = [*convolutions[-1:], op, *inner[::-1]]
  paths = [each.op_name for each in candidates if each.op_name]
  path = next((each for each in paths if any(_scope(each))), (*paths, '')[0])
  kind, place = _scope(path)
  if convolutions or op.opcode == 'convolution':
    if kind != 'squeeze-excite':
      kind = f'convolutions, {(place or "elsewhere").replace("_", " ")}'
  elif {each.opcode for each in inner or [op]} <= _MOVES:
    kind = 'copies'
  elif kind is None:
    kind = 'elementwise and pooling' if place else 'loss and the rest'
  return kind, 'transpose(' in path


def _scope(path: str) -> tuple[str | None, str | None]:
  """Return the category and the part of the network that a path names."""
  scopes = re.findall(r'\w+', path.rpartition('/')[0])
  kind = next((_KINDS[name] for name in _KINDS if name in scopes), None)
  return kind, next(filter(_PLACE.fullmatch, scopes), None)


def collectives(program: hlo.Program, devices: int) -> list[Collective]:
  """Sum up the collectives by kind; the compiler gives no cycles for them.

  Examples:
    >>> program = hlo.parse('''ENTRY %main (x: f32[100]) -> f32[100] {
    ...   %x = f32[100]{0} parameter(0)
    ...   ROOT %sum = f32[100]{0} all-reduce(%x), replica_groups={{0,1,2,3}}
    ... }''')
    >>> collectives(program, devices=4)
    [Collective(name='all-reduce', count=1, payload=400, sent=600.0)]
  """
  found: dict[str, Collective] = {}
  operands = {
    op.name: op
    for computation in program.computations.values()
    for op in computation.ops.values()
  }
  for scheduled, times in program.walk():
    op = begun_by(program, scheduled)
    if not op:
      continue
    kind = op.opcode.removesuffix('-start')
    given = sum(hlo.num_bytes(operands[name].shape) for name in op.operands)
    gathers = kind == 'all-gather'
    payload = given * (_group_size(op, devices) if gathers else 1) * times
    before = found.get(kind, Collective(kind, 0, 0, 0.0))
    found[kind] = Collective(
      kind,
      before.count + times,
      before.payload + payload,
      before.sent + given * times * traffic(op, devices),
    )
  return list(found.values())


def begun_by(program: hlo.Program, op: hlo.Op) -> hlo.Op | None:
  """Return the collective that an operation is or begins, if any.

  On TPU v5e a fusion can begin a collective, which the fusions after it
  continue beside their own work, and a last one ends. Another fusion is an
  all-reduce of which each device keeps a part. TPU7x offloads collectives.
  """
  if op.opcode.removesuffix('-start') in _TRAFFIC:
    return op
  if op.opcode == 'call-start':
    return _first_inside(program, op)
  if any(name.startswith('all-reduce-scatter') for name in op.called):
    found = _first_inside(program, op)
    return found and dataclasses.replace(found, opcode='reduce-scatter')
  return _inside(program, op, 'AsyncCollectiveStart')


def ended_by(program: hlo.Program, op: hlo.Op) -> hlo.Op | None:
  """Return the collective that a fusion ends, if any; see `begun_by`."""
  return _inside(program, op, 'AsyncCollectiveDone')


def _inside(program: hlo.Program, op: hlo.Op, target: str) -> hlo.Op | None:
  if not any(f'="{target}"' in each.rest for each in program.inside(op)):
    return None
  return _first_inside(program, op)


def _first_inside(program: hlo.Program, op: hlo.Op) -> hlo.Op | None:
  inner = program.inside(op)
  return next((each for each in inner if each.opcode in _TRAFFIC), None)


def traffic(op: hlo.Op, devices: int) -> float:
  """Return what a device sends per byte of a collective's operands."""
  kind = op.opcode.removesuffix('-start')
  group = _group_size(op, devices)
  return _TRAFFIC[kind](group) * (group if kind == 'all-gather' else 1)


def _group_size(op: hlo.Op, devices: int) -> int:
  """Return the size of `{{0,1},{2,3}}` or `[2,2]<=[4]`, both groups of two."""
  listed = re.search(r'replica_groups=\{\{([\d,]+)\}', op.rest)
  if listed:
    return listed[1].count(',') + 1
  shaped = re.search(r'replica_groups=\[([\d,]+)\]<=', op.rest)
  if shaped:
    _, *sizes = (int(size) for size in shaped[1].split(','))
    return math.prod(sizes)
  return devices


def _order(category: Category) -> tuple[int, int, str]:
  """Return a sort key: convolutions from stem to head, then the others."""
  if category.name in _ORDER:
    return 1, _ORDER.index(category.name), ''
  place = category.name.partition(', ')[2]
  firsts = ('stem',)
  lasts = ('head', 'linear', 'elsewhere')
  rank = -1 if place in firsts else 1 + (place in lasts and lasts.index(place))
  return 0, rank if place in (*firsts, *lasts) else 0, place
