"""Parse the text of a compiled program: operations, calls and loops.

Covers the part of XLA's text of a scheduled module that a plan needs. All
values are strings and integers, so that tests need only text from real
programs.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import math
import re

_BITS = {'pred': 8, 'token': 0, 'opaque': 0}
_ARRAY = re.compile(r'\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]')
_NAME = re.compile(r'%([^\s,(){}]+)')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# Written for grouped convolutions on TPU7x (libtpu 0.0.42.1).
_NO_ESTIMATE = 2**63 - 1
_OP_NAME = re.compile(r'metadata=\{[^}]*?op_name="([^"]*)"')
_CALLED = re.compile(
  r'\b(?:calls|to_apply|condition|body|true_computation|false_computation)'
  r'=%?([^\s,(){}]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_HEADER = re.compile(r'(ENTRY )?%?(\S+) \(.*\) -> .* \{$')


@dataclasses.dataclass(frozen=True)
class Op:
  """One operation of a computation.

  Attributes:
    name: unique in the program.
    shape: the shape of its result, in XLA's notation.
    opcode: 'fusion', 'copy', 'while', ...
    operands: names of the operations it reads; for a constant or a parameter
      the text in the parentheses.
    rest: the text after the operands.
  """

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  rest: str

  @property
  def cycles(self) -> int:
    """The compiler's estimate, or 0 if there is none."""
    return 0 if self.lacks_estimate else self._written_cycles

  @property
  def lacks_estimate(self) -> bool:
    """Whether the compiler should estimate the operation, but cannot."""
    return self._written_cycles >= _NO_ESTIMATE

  @property
  def _written_cycles(self) -> int:
    found = _CYCLES.search(self.rest)
    return int(found[1]) if found else 0

  @property
  def op_name(self) -> str:
    """The path of JAX's name scopes down to the primitive, or ''."""
    found = _OP_NAME.search(self.rest)
    return found[1] if found else ''

  @property
  def called(self) -> list[str]:
    """Names of the computations that it calls, including branches."""
    branches = _BRANCHES.search(self.rest)
    names = _NAME.findall(branches[1]) if branches else []
    return names or _CALLED.findall(self.rest)

  def attribute(self, key: str) -> str:
    """Return the word after `key=`, or ''."""
    found = re.search(rf'\b{key}=%?([^\s,(){{}}]+)', self.rest)
    return found[1] if found else ''


@dataclasses.dataclass(frozen=True)
class Computation:
  """Named operations in order; `root` is the one that gives the result."""

  name: str
  ops: dict[str, Op]
  root: str


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled module: its computations, and the name of the main one."""

  computations: dict[str, Computation]
  entry: str

  def walk(self) -> Iterator[tuple[Op, int]]:
    """Yield every scheduled operation and how many times it runs.

    For a conditional, only the operations of the costliest branch are yielded.
    A loop with an unknown trip count counts once; see `unknown_loops`.
    Operations that are fused into another, or that another unit computes beside
    the core, are not yielded; see `inside`.
    """
    yield from self._walk(self.entry, 1)

  def _walk(self, name: str, times: int) -> Iterator[tuple[Op, int]]:
    computation = self.computations[name]
    for op in computation.ops.values():
      yield from self._walk_op(computation, op, times)

  def _walk_op(
    self, computation: Computation, op: Op, times: int
  ) -> Iterator[tuple[Op, int]]:
    yield op, times
    if op.opcode == 'while':
      trips = trip_count(self, computation, op)
      body = op.attribute('body')
      yield from self._walk(body, times * (1 if trips is None else trips))
    elif op.opcode == 'conditional':
      costliest = max(op.called, key=self._cycles)
      yield from self._walk(costliest, times)
    elif op.opcode in ('call', 'async-start'):
      for callee in op.called:
        yield from self._walk(callee, times)

  def timeline(self) -> dict[str, tuple[int, int]]:
    """Return when each operation of the main computation begins and ends.

    Returns:
      Name -> cycles since the start, in the order of the schedule.
    """
    main, now = self.computations[self.entry], 0
    times = {}
    for op in main.ops.values():
      walked = self._walk_op(main, op, 1)
      end = now + sum(each.cycles * count for each, count in walked)
      times[op.name] = now, end
      now = end
    return times

  def _cycles(self, name: str) -> int:
    return sum(op.cycles * times for op, times in self._walk(name, 1))

  def unknown_loops(self) -> int:
    """Count the loops whose trip count cannot be derived from the text."""
    return sum(
      trip_count(self, computation, op) is None
      for computation in self.computations.values()
      for op in computation.ops.values()
      if op.opcode == 'while'
    )

  def inside(self, op: Op) -> Iterator[Op]:
    """Yield the operations fused into `op` at any depth, or that it offloads.

    TPU7x offloads collectives and copies to its SparseCore by `call-start`.
    """
    if op.opcode in ('fusion', 'call-start'):
      for callee in op.called:
        for inner in self.computations[callee].ops.values():
          yield inner
          yield from self.inside(inner)


def parse(text: str) -> Program:
  """Parse the text of `compiled.as_text()`.

  Raises:
    ValueError: if it has no entry computation.
  """
  computations: dict[str, Computation] = {}
  ops: dict[str, Op] = {}
  entry = name = root = ''
  for line in text.splitlines():
    if line.startswith('  '):
      op = _parse_op(line.strip())
      ops[op.name] = op
      if line.lstrip().startswith('ROOT '):
        root = op.name
    elif header := _HEADER.match(line):
      name, ops, root = header[2], {}, ''
      entry = name if header[1] else entry
    elif line.startswith('}') and name:  # A thread may be named after it.
      computations[name] = Computation(name, ops, root or [*ops][-1])
      name = ''
  if not entry:
    raise ValueError('The text is not a compiled program.')
  return Program(computations, entry)


def _parse_op(line: str) -> Op:
  """Parse `[ROOT ]%name = SHAPE opcode(operands), rest`."""
  left, _, right = line.removeprefix('ROOT ').partition(' = ')
  end = _closing(right, 0) if right.startswith('(') else right.index(' ')
  shape, right = right[:end], right[end:].lstrip()
  opcode, _, _ = right.partition('(')
  end = _closing(right, len(opcode))
  inner, rest = right[len(opcode) + 1 : end - 1], right[end:]
  operands = _NAME.findall(inner) or ([inner] if inner else [])
  return Op(left.lstrip('%'), shape, opcode, tuple(operands), rest)


def _closing(text: str, start: int) -> int:
  """Return the index after the parenthesis that closes the one at `start`."""
  depth = 0
  for index in range(start, len(text)):
    depth += (text[index] == '(') - (text[index] == ')')
    if not depth:
      return index + 1
  raise ValueError(f"No closing parenthesis in '{text[:80]}'.")


def num_bytes(shape: str) -> int:
  """Count the bytes of an array or tuple, without the layout's padding.

  Examples:
    >>> num_bytes('(f32[3,3,128,256]{3,2,1,0:T(8,128)}, bf16[8]{0}, pred[])')
    1179665
  """
  total = 0
  for kind, dimensions in _ARRAY.findall(re.sub(r'\{[^}]*\}', '', shape)):
    digits = re.search(r'\d+', kind)
    bits = int(digits[0]) if digits else _BITS[kind]
    sizes = [int(size) for size in dimensions.split(',') if size]
    total += -(-math.prod(sizes) * bits // 8)
  return total


def trip_count(program: Program, where: Computation, loop: Op) -> int | None:
  """Derive the trip count of a loop from its condition.

  XLA's text has no trip counts. The condition must compare counters or
  constants; a counter must start at a constant and move by a constant.

  Args:
    program: the program of the loop.
    where: the computation that contains the loop.
    loop: a 'while' operation.

  Returns:
    The trip count, or None if the condition is of another kind.
  """
  condition = program.computations[loop.attribute('condition')]
  body = program.computations[loop.attribute('body')]
  compare = condition.ops[condition.root]
  if compare.opcode != 'compare':
    return None
  sides = [_element(condition, name) for name in compare.operands]
  left, right = (_initial(where, loop, side) for side in sides)
  left_step, right_step = (_step(body, side) for side in sides)
  if left is None or right is None or left_step is None or right_step is None:
    return None
  # From the left side to the right one, and by how much a trip reduces it.
  distance, speed = right - left, left_step - right_step
  direction = compare.attribute('direction')
  if direction in ('GT', 'GE'):
    distance, speed = -distance, -speed
  if direction in ('LE', 'GE'):
    distance += 1
  if direction == 'NE' and speed < 0:
    distance, speed = -distance, -speed
  if direction not in ('LT', 'LE', 'GT', 'GE', 'NE') or speed <= 0:
    return None
  return max(0, -(-distance // speed))


def _element(computation: Computation, name: str) -> Op:
  """Follow a value through copies to the operation that computes it."""
  op = computation.ops[name]
  while op.opcode in ('copy', 'bitcast', 'convert'):
    op = computation.ops[op.operands[0]]
  return op


def _initial(where: Computation, loop: Op, side: Op) -> int | None:
  """Return the value of one side of the condition before the first trip."""
  if side.opcode == 'get-tuple-element':
    carried = where.ops[loop.operands[0]]
    if carried.opcode != 'tuple':
      return None
    index = int(side.attribute('index'))
    side = _element(where, carried.operands[index])
  return _constant(side)


def _step(body: Computation, side: Op) -> int | None:
  """Return by how much one side of the condition changes per trip."""
  if side.opcode == 'constant':
    return 0
  root = body.ops[body.root]
  if side.opcode != 'get-tuple-element' or root.opcode != 'tuple':
    return None
  index = side.attribute('index')
  moved = _element(body, root.operands[int(index)])
  if _is_element(moved, index):
    return 0
  if moved.opcode not in ('add', 'subtract'):
    return None
  left, right = (_element(body, name) for name in moved.operands)
  if moved.opcode == 'add' and _is_element(right, index):
    left, right = right, left
  step = _constant(right)
  if step is None or not _is_element(left, index):
    return None
  return step if moved.opcode == 'add' else -step


def _is_element(op: Op, index: str) -> bool:
  return op.opcode == 'get-tuple-element' and op.attribute('index') == index


def _constant(op: Op) -> int | None:
  if op.opcode != 'constant' or not re.fullmatch(r'-?\d+', op.operands[0]):
    return None
  return int(op.operands[0])
