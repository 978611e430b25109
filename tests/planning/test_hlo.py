"""Loops, calls and sizes, parsed from a compiled program's text."""

import pathlib

import pytest

from nfnet_jax.planning import hlo

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'

LOOP = """
%body (state: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {{
  %state = (s32[], s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %n = s32[] get-tuple-element(%state), index=1
  %x = f32[8] get-tuple-element(%state), index=2
  %by = s32[] constant({by})
  %next = s32[] {move}({of}, %by)
  %last = s32[] subtract(%n, %by)
  %cost = f32[8] sine(%x), backend_config={{"estimated_cycles":"100"}}
  ROOT %made = (s32[], s32[], f32[8]) tuple(%next, {end}, %cost)
}}

%condition (state.1: (s32[], s32[], f32[8])) -> pred[] {{
  %state.1 = (s32[], s32[], f32[8]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %n.1 = s32[] get-tuple-element(%state.1), index=1
  %limit = s32[] constant({limit})
  ROOT %less = pred[] compare({sides}), direction={direction}
}}

ENTRY %main (p: f32[8], q: s32[]) -> f32[8] {{
  %p = f32[8] parameter(0)
  %q = s32[] parameter(1)
  %start = s32[] constant({start})
  %carried = s32[] constant({limit})
  %start.1 = s32[] copy(%start)
  %init = (s32[], s32[], f32[8]) tuple({init})
  %loop = (s32[], s32[], f32[8]) while(%init), condition=%condition, body=%body
  ROOT %out = f32[8] get-tuple-element(%loop), index=2
}}
"""


def trips(
  start=0,
  limit=7,
  by=1,
  move='add',
  of='%i',
  end='%n',
  direction='LT',
  sides='%i.1, %limit',
  init='%start.1, %carried, %p',
):
  program = hlo.parse(LOOP.format(**locals()))
  main = program.computations[program.entry]
  return hlo.trip_count(program, main, main.ops['loop'])


@pytest.mark.parametrize(
  ('expected', 'loop'),
  [
    (7, {}),
    (4, {'start': 3}),
    (8, {'direction': 'LE'}),
    (4, {'by': 2}),  # 0, 2, 4, 6
    (3, {'by': 3}),  # 0, 3, 6
    (0, {'start': 9}),
    (7, {'direction': 'NE'}),
    (7, {'sides': '%limit, %i.1', 'direction': 'GT'}),
    (7, {'sides': '%i.1, %n.1'}),  # A limit that is part of the loop state.
    (9, {'start': 9, 'limit': 0, 'move': 'subtract', 'direction': 'GT'}),
    (10, {'start': 9, 'limit': 0, 'by': -1, 'direction': 'GE'}),
    (9, {'start': 9, 'limit': 0, 'move': 'subtract', 'direction': 'NE'}),
    (4, {'sides': '%i.1, %n.1', 'end': '%last'}),  # Both move: 0-7 to 4-3.
    (None, {'direction': 'EQ'}),
    (None, {'of': '%n'}),  # Not the counter's own value plus one.
    (None, {'by': 0}),
    (None, {'by': -1}),  # Away from its limit.
    (None, {'move': 'multiply'}),
    (None, {'init': '%q, %carried, %p'}),  # A start that is not in the text.
    (None, {'sides': '%i.1, %n.1', 'init': '%start.1, %q, %p'}),
    (None, {'sides': '%limit, %limit'}),
  ],
)
def test_trips_follow_from_the_condition(expected, loop):
  assert trips(**loop) == expected


def simulated(start, limit, by, direction):
  holds = {
    'LT': lambda i: i < limit,
    'LE': lambda i: i <= limit,
    'GT': lambda i: i > limit,
    'GE': lambda i: i >= limit,
  }[direction]
  count = 0
  while holds(start) and count < 100:
    start, count = start + by, count + 1
  return count


@pytest.mark.parametrize('direction', ['LT', 'LE', 'GT', 'GE'])
def test_trips_equal_those_of_a_simulated_loop(direction):
  sign = 1 if direction in ('LT', 'LE') else -1
  for start in range(-3, 4):
    for limit in range(-5, 6):
      for by in (sign, 2 * sign, 3 * sign):
        loop = {'start': start, 'limit': limit, 'by': by}
        expected = simulated(**loop, direction=direction)
        assert trips(**loop, direction=direction) == expected, loop


def test_real_loops():
  program = hlo.parse((FIXTURES / 'loops.hlo').read_text())
  found = {
    op.name: hlo.trip_count(program, computation, op)
    for computation in program.computations.values()
    for op in computation.ops.values()
    if op.opcode == 'while'
  }
  assert found == {
    'while.47': 7,
    'while.49': 9,
    'while.50': 5,
    'while.45': None,
  }
  assert program.unknown_loops() == 1


def test_bodies_count_their_trips_and_nested_ones_multiply():
  program = hlo.parse((FIXTURES / 'loops.hlo').read_text())
  times = {op.name: count for op, count in program.walk()}
  assert times['copy.45'] == 1  # Outside of all loops.
  assert times['fusion.27'] == 7
  assert times['broadcast_multiply_fusion.2'] == 9
  assert times['fusion.30'] == 9 * 5
  cycles = {op.name: op.cycles * count for op, count in program.walk()}
  assert cycles['fusion.27'] == 7 * 2878
  assert cycles['fusion.30'] == 45 * 8596


def test_the_costliest_branch_counts():
  program = hlo.parse((FIXTURES / 'loops.hlo').read_text())
  walked = {op.name for op, _ in program.walk()}
  branches = program.computations['main.20_spmd'].ops['conditional.1'].called
  assert branches == ['region_12.13_spmd', 'region_13.15_spmd']
  costs = {
    name: sum(op.cycles for op in program.computations[name].ops.values())
    for name in branches
  }
  costliest = max(costs, key=costs.get)
  for name in branches:
    timed = {
      o.name for o in program.computations[name].ops.values() if o.cycles
    }
    assert timed
    assert timed <= walked if name == costliest else not timed & walked


@pytest.mark.parametrize('opcode', ['call', 'async-start'])
def test_called_computations_count(opcode):
  attribute = 'to_apply' if opcode == 'call' else 'calls'
  program = hlo.parse(
    '%sub (a: f32[8]) -> f32[8] {\n  %a = f32[8] parameter(0)\n'
    '  ROOT %b = f32[8] sine(%a), backend_config={"estimated_cycles":"5"}\n}'
    '\n\nENTRY %main (x: f32[8]) -> f32[8] {\n'
    f'  ROOT %y = f32[8] {opcode}(%x), {attribute}=%sub\n}}\n'
  )
  assert sum(op.cycles for op, _ in program.walk()) == 5


def test_fused_operations_are_inside_but_not_walked():
  program = hlo.parse((FIXTURES / 'loops.hlo').read_text())
  entry = {op.name: op for op, _ in program.walk()}
  assert 'convolution.12' not in entry
  inside = {op.name for op in program.inside(entry['fusion.27'])}
  # The slice is in a fusion inside the fusion.
  assert {'convolution.12', 'tanh.6', 'dynamic_slice.9'} <= inside


def test_all_fields_of_an_operation():
  (line,) = [
    line
    for line in (FIXTURES / 'loops.hlo').read_text().splitlines()
    if line.startswith('  %fusion.27 =')
  ]
  program = hlo.parse('ENTRY %m (a: f32[]) -> f32[] {\n' + line + '\n}')
  op = program.computations['m'].ops['fusion.27']
  assert op.shape == 'bf16[256,256]{1,0:T(8,128)(2,1)}'
  assert op.opcode == 'fusion'
  assert op.operands == ('copy.46', 'get-tuple-element.195', 'copy.25')
  assert op.called == ['fused_computation.2.clone.1']
  assert op.cycles == 2878
  assert op.op_name.endswith('/while/body/closed_call/dot_general')


@pytest.mark.parametrize(
  ('shape', 'expected'),
  [
    ('f32[]{:T(256)}', 4),
    ('bf16[32,192,192,3]{0,3,2,1:T(4,128)(2,1)}', 32 * 192 * 192 * 3 * 2),
    ('pred[5]{0}', 5),
    ('s4[3]{0}', 2),
    ('(f32[2]{0}, (u8[3]{0}, s64[1]{0}), /*index=2*/token[])', 8 + 3 + 8),
    ('f8e4m3fn[16]{0}', 16),
    ('f32[0,4]{1,0}', 0),
  ],
)
def test_bytes_of_a_shape(shape, expected):
  assert hlo.num_bytes(shape) == expected


def test_a_text_without_a_program_is_an_error():
  with pytest.raises(ValueError, match='not a compiled program'):
    hlo.parse('HloModule nothing\n')
