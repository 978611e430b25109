"""Reads a compiled program's text: operations, calls and loops.

Knows XLA's text of a scheduled module as far as a plan needs it. Everything
here is plain strings and integers, so it is tested on text that was cut from
real programs.
"""

from collections.abc import Iterator
import dataclasses
import math
import re

_BITS = {'pred': 8, 'token': 0, 'opaque': 0}
_ARRAY = re.compile(r'\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]')
_NAME = re.compile(r'%([^\s,(){}]+)')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'metadata=\{[^}]*?op_name="([^"]*)"')
_CALLED = re.compile(r'\b(?:calls|to_apply|condition|body)=%?([^\s,(){}]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_HEADER = re.compile(r'(ENTRY )?%?(\S+) \(.*\) -> .* \{$')


@dataclasses.dataclass(frozen=True)
class Op:
  """One operation of a computation.

  Attributes:
    name: unique in the program.
    shape: what it makes, as XLA writes it.
    opcode: 'fusion', 'copy', 'while', ...
    operands: names of the operations it reads; for a constant or a parameter
      what stands in the parentheses.
    rest: everything after the operands.
  """

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  rest: str

  @property
  def cycles(self) -> int:
    """The compiler's estimate; 0 where it gives none."""
    found = _CYCLES.search(self.rest)
    return int(found[1]) if found else 0

  @property
  def op_name(self) -> str:
    """The path of JAX's name scopes down to the primitive, or ''."""
    found = _OP_NAME.search(self.rest)
    return found[1] if found else ''

  @property
  def called(self) -> list[str]:
    """Names of the computations that it calls, the branches included."""
    branches = _BRANCHES.search(self.rest)
    names = _NAME.findall(branches[1]) if branches else []
    return names or _CALLED.findall(self.rest)

  def attribute(self, key: str) -> str:
    """Returns the word after `key=`, or ''."""
    found = re.search(rf'\b{key}=%?([^\s,(){{}}]+)', self.rest)
    return found[1] if found else ''


@dataclasses.dataclass(frozen=True)
class Computation:
  """A named list of operations; the last one executed is `root`."""

  name: str
  ops: dict[str, Op]
  root: str


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled module: its computations, and the one that is run."""

  computations: dict[str, Computation]
  entry: str

  def walk(self) -> Iterator[tuple[Op, int]]:
    """Yields every scheduled operation with how often it runs.

    Of a conditional's branches only the costliest is yielded. A loop whose
    trips do not follow from its condition counts once; see `unknown_loops`.
    What is fused into an operation is not yielded.
    """
    yield from self._walk(self.entry, 1)

  def _walk(self, name: str, times: int) -> Iterator[tuple[Op, int]]:
    computation = self.computations[name]
    for op in computation.ops.values():
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

  def _cycles(self, name: str) -> int:
    return sum(op.cycles * times for op, times in self._walk(name, 1))

  def unknown_loops(self) -> int:
    """Counts the loops that run, as far as the text tells, any times."""
    return sum(
      trip_count(self, computation, op) is None
      for computation in self.computations.values()
      for op in computation.ops.values()
      if op.opcode == 'while'
    )

  def inside(self, op: Op) -> Iterator[Op]:
    """Yields the operations fused into one, at any depth."""
    if op.opcode == 'fusion':
      for callee in op.called:
        for inner in self.computations[callee].ops.values():
          yield inner
          yield from self.inside(inner)


def parse(text: str) -> Program:
  """Reads the text of `compiled.as_text()`.

  Raises:
    ValueError: if it holds no computation that is run.
  """
  computations, entry = {}, ''
  name, ops, root = '', {}, ''
  for line in text.splitlines():
    if line.startswith('  '):
      op = _parse_op(line.strip())
      ops[op.name] = op
      if line.lstrip().startswith('ROOT '):
        root = op.name
    elif header := _HEADER.match(line):
      name, ops, root = header[2], {}, ''
      entry = name if header[1] else entry
    elif line == '}' and name:
      computations[name] = Computation(name, ops, root or [*ops][-1])
      name = ''
  if not entry:
    raise ValueError('The text is not that of a compiled program.')
  return Program(computations, entry)


def _parse_op(line: str) -> Op:
  """Reads `[ROOT ]%name = SHAPE opcode(operands), rest`."""
  left, _, right = line.removeprefix('ROOT ').partition(' = ')
  end = _closing(right, 0) if right.startswith('(') else right.index(' ')
  shape, right = right[:end], right[end:].lstrip()
  opcode, _, _ = right.partition('(')
  end = _closing(right, len(opcode))
  inner, rest = right[len(opcode) + 1 : end - 1], right[end:]
  operands = _NAME.findall(inner) or ([inner] if inner else [])
  return Op(left.lstrip('%'), shape, opcode, tuple(operands), rest)


def _closing(text: str, start: int) -> int:
  """Returns the place after the parenthesis that closes the one at `start`."""
  depth = 0
  for index in range(start, len(text)):
    depth += (text[index] == '(') - (text[index] == ')')
    if not depth:
      return index + 1
  raise ValueError(f"No closing parenthesis in '{text[:80]}'.")


def num_bytes(shape: str) -> int:
  """Counts the bytes of an array or tuple, without the layout's padding.

  Example:
    >>> num_bytes('(f32[3,3,128,256]{3,2,1,0:T(8,128)}, bf16[8]{0}, pred[])')
    1179665
  """
  total = 0
  for kind, dimensions in _ARRAY.findall(re.sub(r'\{[^}]*\}', '', shape)):
    bits = _BITS.get(kind)
    if bits is None:
      bits = int(re.search(r'\d+', kind)[0])
    sizes = [int(size) for size in dimensions.split(',') if size]
    total += -(-math.prod(sizes) * bits // 8)
  return total


def trip_count(program: Program, where: Computation, loop: Op) -> int | None:
  """Derives how often a loop runs from its condition.

  The condition must compare counters or constants; a counter must start at a
  constant and move by one. The text has no trip counts of its own.

  Args:
    program: what the loop is part of.
    where: the computation that the loop stands in.
    loop: a 'while'.

  Returns:
    The trips, or None where they are not of this form.
  """
  condition = program.computations[loop.attribute('condition')]
  body = program.computations[loop.attribute('body')]
  compare = condition.ops[condition.root]
  if compare.opcode != 'compare':
    return None
  sides = [_element(condition, name) for name in compare.operands]
  start = [_initial(where, loop, side) for side in sides]
  step = [_step(body, side) for side in sides]
  if None in start or None in step:
    return None
  # How far the right side is, and how fast the left one comes nearer.
  distance, speed = start[1] - start[0], step[0] - step[1]
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
  """Follows a value through copies to what it is."""
  op = computation.ops[name]
  while op.opcode in ('copy', 'bitcast', 'convert'):
    op = computation.ops[op.operands[0]]
  return op


def _initial(where: Computation, loop: Op, side: Op) -> int | None:
  """Returns a condition's side before the first trip."""
  if side.opcode == 'get-tuple-element':
    carried = where.ops[loop.operands[0]]
    if carried.opcode != 'tuple':
      return None
    index = int(side.attribute('index'))
    side = _element(where, carried.operands[index])
  return _constant(side)


def _step(body: Computation, side: Op) -> int | None:
  """Returns by how much a condition's side moves in a trip."""
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
