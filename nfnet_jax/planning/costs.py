"""What a compiled step costs by the compiler's own estimate, and on what."""

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
# Collective -> bytes that each of n devices sends for a byte of the whole.
_TRAFFIC: dict[str, Callable[[int], float]] = {
  'all-reduce': lambda n: 2 * (n - 1) / n,
  'all-gather': lambda n: (n - 1) / n,
  'reduce-scatter': lambda n: (n - 1) / n,
  'all-to-all': lambda n: (n - 1) / n,
  'collective-permute': lambda n: 1.0,
}
# A scope in an operation's path -> what its cycles are for; the first wins.
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
class Part:
  """A share of a step's cycles.

  Attributes:
    name: such as 'convolutions, stage 2'.
    forward: cycles of the forward pass, and of what is no pass.
    backward: cycles of the backward pass.
  """

  name: str
  forward: int
  backward: int

  @property
  def cycles(self) -> int:
    return self.forward + self.backward


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of one kind.

  Attributes:
    name: XLA's, such as 'all-reduce'.
    count: how many a step runs.
    payload: bytes of what is reduced or gathered, whole.
    sent: bytes that each device must send at least.
  """

  name: str
  count: int
  payload: int
  sent: float


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A step by the compiler's estimate, on each device.

  Attributes:
    cycles: sum over the scheduled operations, loop bodies times their trips.
      Collectives, asynchronous copies and scalar work have no estimate.
    parts: what the cycles are for.
    collectives: what is sent between devices.
    unknown_loops: loops that were counted once, because their trips don't
      follow from their condition.
  """

  cycles: int
  parts: Sequence[Part]
  collectives: Sequence[Collective]
  unknown_loops: int


def read(text: str, devices: int) -> Schedule:
  """Reads a compiled step.

  Args:
    text: of `compiled.as_text()`.
    devices: how many run the step together.
  """
  program = hlo.parse(text)
  cycles: dict[str, list[int]] = {}
  for op, times in program.walk():
    if op.cycles:
      name, is_backward = attribute(program, op)
      cycles.setdefault(name, [0, 0])[is_backward] += op.cycles * times
  parts = [Part(name, *passes) for name, passes in cycles.items()]
  return Schedule(
    cycles=sum(part.cycles for part in parts),
    parts=sorted(parts, key=_order),
    collectives=collectives(program, devices),
    unknown_loops=program.unknown_loops(),
  )


def attribute(program: hlo.Program, op: hlo.Op) -> tuple[str, bool]:
  """Says what an operation's cycles are for, and if in the backward pass.

  What is fused with a convolution counts as the convolution; any other fusion
  is what its result is, or, where that has no scope of its own, such as a
  choice between old and new parameters, what it is made of.
  """
  inner = list(program.inside(op))
  convolutions = [each for each in inner if each.opcode == 'convolution']
  made_of = [*convolutions[-1:], op, *inner[::-1]]
  paths = [each.op_name for each in made_of if each.op_name]
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
  """Reads what an operation is for, and where in the network, from its path."""
  scopes = re.findall(r'\w+', path.rpartition('/')[0])
  kind = next((_KINDS[name] for name in _KINDS if name in scopes), None)
  return kind, next(filter(_PLACE.fullmatch, scopes), None)


def collectives(program: hlo.Program, devices: int) -> list[Collective]:
  """Adds up what devices send each other; the compiler gives no cycles for it.

  Example:
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
  for op, times in program.walk():
    kind = op.opcode.removesuffix('-start')
    if kind not in _TRAFFIC:
      continue
    group = _group_size(op, devices)
    given = sum(hlo.num_bytes(operands[name].shape) for name in op.operands)
    payload = given * (group if kind == 'all-gather' else 1) * times
    before = found.get(kind, Collective(kind, 0, 0, 0.0))
    found[kind] = Collective(
      kind,
      before.count + times,
      before.payload + payload,
      before.sent + payload * _TRAFFIC[kind](group),
    )
  return list(found.values())


def _group_size(op: hlo.Op, devices: int) -> int:
  """Reads `{{0,1},{2,3}}`, or `[2,2]<=[4]`: groups of two."""
  listed = re.search(r'replica_groups=\{\{([\d,]+)\}', op.rest)
  if listed:
    return listed[1].count(',') + 1
  shaped = re.search(r'replica_groups=\[([\d,]+)\]<=', op.rest)
  if shaped:
    _, *sizes = (int(size) for size in shaped[1].split(','))
    return math.prod(sizes)
  return devices


def _order(part: Part):
  """Sorts convolutions first, from the stem on, and then by kind."""
  if part.name in _ORDER:
    return 1, _ORDER.index(part.name), ''
  place = part.name.partition(', ')[2]
  firsts = ('stem',)
  lasts = ('head', 'linear', 'elsewhere')
  rank = -1 if place in firsts else 1 + (place in lasts and lasts.index(place))
  return 0, rank if place in (*firsts, *lasts) else 0, place
