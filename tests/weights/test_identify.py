"""The model of a tree is identified; a tree that fits none is refused."""

import numpy as np
import pytest

import nfnet_jax
from nfnet_jax.weights import identify
from tests.weights import trees

SMALL = [name for name in nfnet_jax.list_models() if 'pico' in name]
LARGE = [
  'nfnet_f0',
  'nfnet_f0_plus',
  'nfnet_f0_baseline',
  'nf_resnet50',
  'bn_resnet50',
  'efficientnet_b0',
]


def changed(change, name='nfnet_pico'):
  """Return copies of a model's trees, after `change` is applied to them."""
  copies = tuple(
    {path: dict(leaves) for path, leaves in tree.items()}
    for tree in trees.abstract(name)
  )
  change(*copies)
  return copies


def mismatch(both):
  with pytest.raises(identify.MismatchError) as info:
    identify.identify(*both)
  assert '\n' not in str(info.value)
  return str(info.value)


@pytest.mark.parametrize(
  'name',
  [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)],
)
def test_models_are_distinguished(name):
  assert identify.identify(*trees.abstract(name)) == (name, 10)


@pytest.mark.full
@pytest.mark.parametrize('name', nfnet_jax.list_models())
def test_all_models_are_distinguished(name):
  assert identify.identify(*identify.abstract_trees(name, 10, {})) == (name, 10)


@pytest.mark.parametrize('num_classes', [1, 2, 1000, 21_843])
def test_any_number_of_classes(num_classes):
  both = trees.abstract('nfnet_pico', num_classes)
  assert identify.identify(*both) == ('nfnet_pico', num_classes)


def test_order_of_paths_does_not_matter():
  def turn(params, state):
    items = list(params.items())[::-1]
    params.clear()
    params.update(items)

  assert identify.identify(*changed(turn)) == ('nfnet_pico', 10)


def test_wrong_shapes_are_named():
  def widen(params, state):
    params['NFNet/~/nf_block/~/conv1']['w'] = np.zeros((3, 3, 8, 9))

  assert mismatch(changed(widen)) == (
    "they fit no known model; of 'nfnet_pico' they differ in: "
    'NFNet/~/nf_block/~/conv1/w is [3, 3, 8, 9], not [3, 3, 8, 8]'
  )


def test_missing_paths_are_named():
  def drop(params, state):
    del params['NFNet/~/final_conv']['gain']
    del params['NFNet/~/stem_conv2']

  message = mismatch(changed(drop))
  assert "of 'nfnet_pico' they differ in: " in message
  assert 'NFNet/~/final_conv/gain is missing, not [192]; ' in message
  assert 'NFNet/~/stem_conv2/bias is missing, not [16]; ' in message
  assert message.endswith('; and 1 more')


@pytest.mark.parametrize('path', ['NFNet/~/extra', 'aux/~/conv', 'x', ''])
def test_surplus_paths_are_named_in_any_position(path):
  def add(params, state):
    items = list(params.items())
    params.clear()
    params.update([(path, {'w': np.zeros(3)}), *items])

  message = mismatch(changed(add))
  assert message.endswith(f'they differ in: {path}/w is [3], not expected')


def test_a_missing_block_is_compared_with_the_nearest():
  def drop(params, state):
    for path in [path for path in params if 'nf_block_3' in path]:
      del params[path]

  assert "of 'nfnet_pico' they differ in: NFNet/~/nf_block_3" in mismatch(
    changed(drop)
  )


def test_state_is_compared_too():
  def drop(params, state):
    state.popitem()

  assert 'is missing, not [' in mismatch(changed(drop, 'bn_resnet_pico'))

  def add(params, state):
    state['NFNet/~/norm'] = {'average': np.zeros(3)}

  assert 'NFNet/~/norm/average is [3], not expected' in mismatch(changed(add))


@pytest.mark.parametrize(
  ('params', 'expected'),
  [
    ({}, "no classifier '/~/linear/w'"),
    ({'Foo/~/x': {'w': np.zeros(3)}}, "no classifier 'Foo/~/linear/w'"),
    ({'Foo/~/linear': {'w': np.zeros(3)}}, "no classifier 'Foo/~/linear/w'"),
    ({'NFNet/~/linear': {}}, 'no classifier'),
    ({'NFNet/~/linear': {'w': np.zeros((192, 0))}}, 'no classifier'),
    (
      {'Foo/~/linear': {'w': np.zeros((3, 2))}},
      "paths begin with 'Foo', not with one of",
    ),
    (
      {'NFNet/~/linear': {'w': np.zeros((0, 1 << 50))}},
      'is missing, not [',
    ),
  ],
)
def test_trees_of_other_networks(params, expected):
  assert expected in mismatch((params, {}))


def test_check_takes_options():
  both = trees.abstract('nfnet_pico')
  identify.check('nfnet_pico', 10, {'alpha': 0.3}, both)
  with pytest.raises(identify.MismatchError, match=r'linear/b is \[10\], not'):
    identify.check('nfnet_pico', 11, {}, both)
  with pytest.raises(identify.MismatchError, match='cannot be built'):
    identify.check('nfnet_pico', 10, {'colour': 1}, both)
  with pytest.raises(ValueError, match="Unknown model 'nfnet_pic'"):
    identify.check('nfnet_pic', 10, {}, both)


def test_options_that_change_the_tree():
  with_se = identify.abstract_trees('nf_resnet_pico', 10, {'se_ratio': 0.5})
  identify.check('nf_resnet_pico', 10, {'se_ratio': 0.5}, with_se)
  with pytest.raises(identify.MismatchError, match='squeeze_excite'):
    identify.check('nf_resnet_pico', 10, {}, with_se)
