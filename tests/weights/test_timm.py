"""NFNets are converted to timm's names and layouts, and back."""

import json

import numpy as np
import pytest

from nfnet_jax.models import nfnet, registry
from nfnet_jax.weights import identify, load, network, timm
from tests.models import regenerate
from tests.weights import trees

F0 = nfnet.VARIANTS['f0'].depth


def conv(name, out, inner, size):
  return {
    f'{name}.weight': (out, inner, size, size),
    f'{name}.gain': (out, 1, 1, 1),
    f'{name}.bias': (out,),
  }


def block(name, channels, width, group, first):
  inner = width // 2
  return {
    **(conv(f'{name}.downsample.conv', width, channels, 1) if first else {}),
    **conv(f'{name}.conv1', inner, channels, 1),
    **conv(f'{name}.conv2', inner, group, 3),
    **conv(f'{name}.conv2b', inner, group, 3),
    **conv(f'{name}.conv3', width, inner, 1),
    f'{name}.attn_last.fc1.weight': (inner, width, 1, 1),
    f'{name}.attn_last.fc1.bias': (inner,),
    f'{name}.attn_last.fc2.weight': (width, inner, 1, 1),
    f'{name}.attn_last.fc2.bias': (width,),
    f'{name}.skipinit_gain': (),
  }


def expected(stem, widths, depths, group, final, num_classes):
  """Return names and shapes as timm has them."""
  shapes = {}
  for i, (inner, out) in enumerate(zip((3, *stem), stem)):
    shapes |= conv(f'stem.conv{i + 1}', out, inner, 3)
  channels = stem[-1]
  for stage, (width, depth) in enumerate(zip(widths, depths)):
    for index in range(depth):
      name = f'stages.{stage}.{index}'
      shapes |= block(name, channels, width, group, index == 0)
      channels = width
  shapes |= conv('final_conv', final, channels, 1)
  shapes['head.fc.weight'] = (num_classes, final)
  return {**shapes, 'head.fc.bias': (num_classes,)}


SHAPES = {
  'nfnet_pico': expected(
    (4, 8, 16, 8), (16, 32, 96, 96), (1, 1, 1, 1), 8, 192, 10
  ),
  'nfnet_f0': expected(
    (16, 32, 64, 128), (256, 512, 1536, 1536), (1, 2, 6, 3), 128, 3072, 1000
  ),
}


def shapes(arrays):
  return {name: np.shape(array) for name, array in arrays.items()}


@pytest.fixture(scope='module')
def pico():
  return trees.filled()[0]


@pytest.fixture(scope='module')
def pico_of_timm(pico):
  return timm.to_timm(pico, (1, 1, 1, 1))


def test_names_and_layouts_of_pico(pico_of_timm):
  assert shapes(pico_of_timm) == SHAPES['nfnet_pico']


def test_names_and_layouts_of_f0():
  """F0 has several blocks per stage. Its arrays are views of one zero."""
  zeros = {
    name: np.broadcast_to(np.float32(0), shape)
    for name, shape in SHAPES['nfnet_f0'].items()
  }
  params = timm.from_timm(zeros)
  assert identify.identify(params, {}) == ('nfnet_f0', 1000)
  assert len(params) == 94  # As many modules as the published file has.
  assert shapes(timm.to_timm(params, F0)) == SHAPES['nfnet_f0']


@pytest.mark.parametrize('name', ['nfnet_l0', 'eca_nfnet_l0'])
def test_names_and_layouts_of_light_networks(name):
  path = regenerate.GOLDEN / f'timm_{name}_names.json'
  golden = {k: tuple(v) for k, v in json.loads(path.read_text()).items()}
  arrays = {
    key: np.broadcast_to(np.float32(0), shape) for key, shape in golden.items()
  }
  params = timm.from_timm(arrays)
  assert identify.identify(params, {}) == (name, 1000)
  depth = registry.get_model_spec(name).family.variants[name].depth
  assert shapes(timm.to_timm(params, depth)) == golden


def test_round_trip_of_a_light_network_is_exact():
  params = trees.filled('eca_nfnet_pico')[0]
  depth = (1, 1, 1, 1)
  trees.assert_equal(timm.from_timm(timm.to_timm(params, depth)), params)


def test_round_trip_is_exact(pico, pico_of_timm):
  trees.assert_equal(timm.from_timm(pico_of_timm), pico)


def test_axes_of_kernels(pico, pico_of_timm):
  ours, theirs = pico, pico_of_timm
  stem = ours['NFNet/~/stem_conv1']['w']
  assert stem.shape == (3, 3, 4, 8)
  for h, w, i, o in ((0, 1, 2, 3), (2, 0, 3, 7), (1, 2, 0, 5)):
    assert theirs['stem.conv2.weight'][o, i, h, w] == stem[h, w, i, o]
  grouped = ours['NFNet/~/nf_block_1/~/conv1b']['w']
  assert grouped.shape == (3, 3, 8, 16)  # Two groups of eight.
  for h, w, i, o in ((0, 1, 2, 13), (2, 0, 7, 8)):
    their = theirs['stages.1.0.conv2b.weight']
    assert their[o, i, h, w] == grouped[h, w, i, o]
  linear = ours['NFNet/~/linear']['w']
  assert theirs['head.fc.weight'][7, 100] == linear[100, 7]
  squeeze = ours['NFNet/~/nf_block_2/~/squeeze_excite/~/linear']['w']
  assert squeeze.shape == (96, 48)
  assert (
    theirs['stages.2.0.attn_last.fc1.weight'][5, 80, 0, 0] == (squeeze[80, 5])
  )
  gain = ours['NFNet/~/nf_block_3/~/conv2']['gain']
  assert theirs['stages.3.0.conv3.gain'][40, 0, 0, 0] == gain[40]
  assert (
    theirs['stages.3.0.skipinit_gain']
    == (ours['NFNet/~/nf_block_3']['skip_gain'])
  )


def test_names_of_modules(pico, pico_of_timm):
  pairs = {
    'stem_conv0': 'stem.conv1',
    'stem_conv3': 'stem.conv4',
    'final_conv': 'final_conv',
    'nf_block/~/conv0': 'stages.0.0.conv1',
    'nf_block/~/conv1': 'stages.0.0.conv2',
    'nf_block/~/conv1b': 'stages.0.0.conv2b',
    'nf_block/~/conv2': 'stages.0.0.conv3',
    'nf_block_2/~/conv_shortcut': 'stages.2.0.downsample.conv',
  }
  for ours, theirs in pairs.items():
    bias = pico[f'NFNet/~/{ours}']['bias']
    np.testing.assert_array_equal(pico_of_timm[f'{theirs}.bias'], bias)
  for ours, theirs in (('linear', 'fc1'), ('linear_1', 'fc2')):
    bias = pico[f'NFNet/~/nf_block_1/~/squeeze_excite/~/{ours}']['b']
    their = pico_of_timm[f'stages.1.0.attn_last.{theirs}.bias']
    np.testing.assert_array_equal(their, bias)


def test_blocks_are_numbered_across_stages():
  for ours, theirs in {
    'nf_block': 'stages.0.0',
    'nf_block_1': 'stages.1.0',
    'nf_block_2': 'stages.1.1',
    'nf_block_3': 'stages.2.0',
    'nf_block_8': 'stages.2.5',
    'nf_block_9': 'stages.3.0',
    'nf_block_11': 'stages.3.2',
  }.items():
    params = {f'NFNet/~/{ours}': {'skip_gain': np.zeros(())}}
    assert list(timm.to_timm(params, F0)) == [f'{theirs}.skipinit_gain']


def test_timm_is_recognised_by_its_names(pico, pico_of_timm):
  assert timm.is_timm(pico_of_timm)
  assert not timm.is_timm(trees.flat(pico))
  assert not timm.is_timm({})


@pytest.mark.parametrize(
  'surplus',
  [
    'head.fc.scale',
    'stem.conv5.weight',
    'stages.0.0.conv4.weight',
    'stages.0.1.attn.weight',
    'stages.1000000000.0.conv1.weight',
    'stages.0.1000000000.conv1.weight',
    'stages.-1.0.conv1.weight',
    'stages.00.0.conv1.weight',
    'fc.weight',
    'weight',
    '',
  ],
)
def test_surplus_names_are_refused(pico_of_timm, surplus):
  arrays = {**pico_of_timm, surplus: np.zeros((1, 1, 1, 1), np.float32)}
  with pytest.raises(timm.LayoutError, match=f"an array '{surplus}'$"):
    timm.from_timm(arrays)


@pytest.mark.parametrize(
  ('name', 'shape'),
  [
    ('stem.conv1.weight', (3,)),
    ('stages.0.0.attn_last.fc1.weight', (8, 16, 3, 3)),
    ('stages.0.0.skipinit_gain', (2,)),
    ('stages.0.0.attn_last.conv.weight', (2, 1, 3)),
    ('head.fc.weight', ()),
  ],
)
def test_shapes_that_cannot_be_converted_are_named(pico_of_timm, name, shape):
  arrays = {**pico_of_timm, name: np.zeros(shape, np.float32)}
  with pytest.raises(timm.LayoutError, match=f"'{name}' has the shape"):
    timm.from_timm(arrays)


def test_other_shapes_are_named_under_our_paths(tmp_path, pico_of_timm):
  wrong = {**pico_of_timm, 'stem.conv1.weight': np.zeros((4, 3, 5, 5), 'f4')}
  np.savez(tmp_path / 'a.npz', **wrong)
  with pytest.raises(
    network.WeightsError, match=r'stem_conv0/w is \[5, 5, 3, 4'
  ):
    load.load_weights(tmp_path / 'a.npz')


def test_a_missing_array_is_named_under_our_paths(tmp_path, pico_of_timm):
  less = {k: v for k, v in pico_of_timm.items() if 'conv2b.gain' not in k}
  np.savez(tmp_path / 'a.npz', **less)
  with pytest.raises(network.WeightsError, match='conv1b/gain is missing'):
    load.load_weights(tmp_path / 'a.npz')
