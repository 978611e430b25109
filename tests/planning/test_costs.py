"""The categories of cycles, and the bytes that devices send."""

import pathlib

import pytest

from nfnet_jax.planning import costs, hlo

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'


@pytest.fixture(scope='module')
def step():
  return hlo.parse((FIXTURES / 'step.hlo').read_text())


# Read from the text by hand: operation, category, whether backward.
EXPECTED = [
  ('fusion.2353', 'convolutions, stem', True),
  ('fusion.2491', 'convolutions, stem', False),
  ('multiply_bitcast_fusion', 'convolutions, stage 1', True),
  ('multiply_bitcast_fusion.1', 'convolutions, stage 2', True),
  ('copy.2588', 'copies', False),
  ('copy.2714', 'copies', True),
  ('fusion.3774', 'elementwise and pooling', True),
  ('multiply_add_fusion.45', 'elementwise and pooling', False),
  ('multiply_reduce_fusion.7', 'AGC', False),
  ('multiply_reduce_fusion.21', 'optimiser and EMA', False),
  ('fusion.128', 'casts of parameters and gradients', False),
]


@pytest.mark.parametrize(('name', 'kind', 'backward'), EXPECTED)
def test_attribution_of_a_real_step(step, name, kind, backward):
  op = step.computations[step.entry].ops[name]
  assert costs.attribute(step, op) == (kind, backward)


def test_a_real_step_has_all_categories(step):
  plan = costs.read((FIXTURES / 'step.hlo').read_text(), devices=8)
  names = [category.name for category in plan.categories]
  assert names == [
    'convolutions, stem',
    'convolutions, stage 0',
    'convolutions, stage 1',
    'convolutions, stage 2',
    'convolutions, stage 3',
    'AGC',
    'optimiser and EMA',
    'weight standardisation',
    'squeeze-excite',
    'casts of parameters and gradients',
    'elementwise and pooling',
    'copies',
    'loss and the rest',
  ]
  # The sum over the lines of the entry computation, as grep finds them.
  text = (FIXTURES / 'step.hlo').read_text().partition('ENTRY')[2]
  summed = sum(
    int(rest.partition('"')[0])
    for rest in text.split('"estimated_cycles":"')[1:]
  )
  assert plan.cycles == summed > 0
  assert plan.cycles == sum(category.cycles for category in plan.categories)
  update = plan.categories[names.index('optimiser and EMA')]
  assert update.backward == 0 < update.forward


def program(*lines):
  body = '\n'.join(f'  {line}' for line in lines)
  return hlo.parse(
    '%fused (a: f32[8]) -> f32[8] {\n  %a = f32[8] parameter(0)\n'
    '  ROOT %copied = f32[8] copy(%a)\n}\n\n'
    f'ENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n'
  )


def attributed(op_name, opcode='add(%x)'):
  made = program(f'%y = f32[8] {opcode}, metadata={{op_name="{op_name}"}}')
  return costs.attribute(made, made.computations['main'].ops['y'])


@pytest.mark.parametrize(
  ('path', 'expected'),
  [
    ('f/jvp(Net)/stage_1/block/conv/add', ('elementwise and pooling', False)),
    ('f/jvp(Net)/stem/squeeze_excite/mul', ('squeeze-excite', False)),
    ('f/transpose(jvp(Net))/head/bn/batch_norm/mul', ('batch norm', True)),
    ('f/jvp(Net)/stage_0/c/standardize/mul', ('weight standard', False)),
    ('f/update/agc/reduce_sum', ('AGC', False)),
    ('f/update/select_n', ('optimiser and EMA', False)),
    ('f/transpose(jvp(cast))/convert', ('casts', True)),
    ('f/jvp()/log', ('loss and the rest', False)),
    # A primitive's own name is no scope.
    ('f/jvp()/cast', ('loss and the rest', False)),
    ('', ('loss and the rest', False)),
  ],
)
def test_scopes_determine_the_category(path, expected):
  kind, backward = attributed(path)
  assert kind.startswith(expected[0])
  assert backward == expected[1]


def test_a_dot_of_squeeze_excite_is_no_convolution():
  path = 'f/jvp(Net)/stage_1/block/squeeze_excite/linear/dot_general'
  assert attributed(path, 'convolution(%x, %x)')[0] == 'squeeze-excite'
  path = 'f/jvp(Net)/linear/dot_general'
  assert attributed(path, 'convolution(%x, %x)')[0] == 'convolutions, linear'
  assert attributed('', 'convolution(%x)')[0] == 'convolutions, elsewhere'


def test_an_operation_that_only_moves_data_is_a_copy_in_any_scope():
  for opcode in ('copy(%x)', 'reverse(%x)', 'fusion(%x), calls=%fused'):
    assert attributed('f/update/agc/mul', opcode)[0] == 'copies'


def test_a_fusion_without_a_name_takes_that_of_its_operations():
  text = (
    '%fused (a: f32[8]) -> f32[8] {\n  %a = f32[8] parameter(0)\n'
    '  ROOT %b = f32[8] sine(%a), metadata={op_name="f/jvp(N)/stage_0/sin"}\n}'
    '\n\nENTRY %main (x: f32[8]) -> f32[8] {\n'
    '  ROOT %y = f32[8] fusion(%x), calls=%fused\n}\n'
  )
  made = hlo.parse(text)
  op = made.computations['main'].ops['y']
  assert costs.attribute(made, op) == ('elementwise and pooling', False)


@pytest.mark.parametrize(
  ('inner', 'expected'),
  [
    ('f/update/mul', 'optimiser and EMA'),
    ('f/jvp(N)/stage_0/mul', 'elementwise and pooling'),
    ('f/jvp()/mul', 'loss and the rest'),
  ],
)
def test_a_result_without_a_scope_takes_that_of_its_operations(inner, expected):
  text = (
    '%fused (a: f32[8]) -> f32[8] {\n  %a = f32[8] parameter(0)\n'
    f'  %b = f32[8] multiply(%a, %a), metadata={{op_name="{inner}"}}\n'
    '  ROOT %c = f32[8] select(%a, %b), metadata={op_name="f/select_n"}\n}'
    '\n\nENTRY %main (x: f32[8]) -> f32[8] {\n'
    '  ROOT %y = f32[8] fusion(%x), calls=%fused, '
    'metadata={op_name="f/select_n"}\n}\n'
  )
  made = hlo.parse(text)
  op = made.computations['main'].ops['y']
  assert costs.attribute(made, op) == (expected, False)


def collective(line, devices=8, shape='f32[100]'):
  made = program(f'%x = {shape} parameter(0)', f'%y = {line}')
  return costs.collectives(made, devices)


@pytest.mark.parametrize(
  ('line', 'payload', 'sent'),
  [
    # 400 bytes on each of 4 devices, groups written as lists ...
    ('f32[100] all-reduce(%x), replica_groups={{0,1,2,3}}', 400, 600),
    ('f32[25] reduce-scatter(%x), replica_groups={{0,1,2,3}}', 400, 300),
    ('f32[400] all-gather(%x), replica_groups={{0,1,2,3}}', 1600, 1200),
    ('f32[100] collective-permute(%x)', 400, 400),
    # ... or as a shape: two groups of four. Without groups, all devices.
    ('f32[100] all-reduce(%x), replica_groups=[2,4]<=[8]', 400, 600),
    ('f32[100] all-reduce(%x), replica_groups={}', 400, 700),
    ('f32[100] all-reduce-start(%x), replica_groups={{0,1}}', 400, 400),
  ],
)
def test_bytes_of_collectives(line, payload, sent):
  (found,) = collective(line)
  assert (found.count, found.payload, found.sent) == (1, payload, sent)


def test_the_end_of_an_asynchronous_collective_does_not_count_again():
  assert collective('f32[100] all-reduce-done(%x)') == []


def test_collectives_of_a_real_step():
  plan = costs.read((FIXTURES / 'step.hlo').read_text(), devices=8)
  (found,) = plan.collectives
  assert found.name == 'all-reduce'
  assert found.payload == 35389440
  assert found.sent == found.payload * 2 * 7 / 8


def test_cycles_of_loops_count_their_trips():
  text = (FIXTURES / 'loops.hlo').read_text()
  walked = sum(op.cycles * times for op, times in hlo.parse(text).walk())
  once = sum(op.cycles for op, _ in hlo.parse(text).walk())
  assert costs.read(text, 8).cycles == walked > 10 * once
  assert costs.read(text, 8).unknown_loops == 1


def test_operations_without_an_estimate_count_as_nothing():
  text = (FIXTURES / 'loops.hlo').read_text()
  known = costs.read(text, 8)
  (first, *_) = [op for op, _ in hlo.parse(text).walk() if op.cycles]
  unknown = costs.read(
    text.replace(
      f'"estimated_cycles":"{first.cycles}"',
      f'"estimated_cycles":"{2**63 - 1}"',
    ),
    8,
  )
  assert known.not_estimated == 0 < unknown.not_estimated
  assert unknown.cycles < known.cycles


def test_a_fusion_with_a_convolution_counts_as_the_convolution():
  text = (
    '%fused (a: f32[8]) -> f32[8] {\n  %a = f32[8] parameter(0)\n'
    '  %c = f32[8] convolution(%a, %a), metadata={op_name="f/transpose(jvp(N))'
    '/stage_1/conv/conv_general_dilated"}\n'
    '  ROOT %b = f32[8] sine(%c), metadata={op_name="f/update/sin"}\n}'
    '\n\nENTRY %main (x: f32[8]) -> f32[8] {\n'
    '  ROOT %y = f32[8] fusion(%x), calls=%fused, '
    'metadata={op_name="f/update/sin"}\n}\n'
  )
  made = hlo.parse(text)
  op = made.computations['main'].ops['y']
  assert costs.attribute(made, op) == ('convolutions, stage 1', True)


def test_collectives_of_loops_count_their_trips():
  text = (FIXTURES / 'loops.hlo').read_text()
  found = {each.name: each for each in costs.read(text, 8).collectives}
  assert found['all-reduce'].count == 2
  assert found['all-gather'].payload == 8 * 256 * 256 * 2
