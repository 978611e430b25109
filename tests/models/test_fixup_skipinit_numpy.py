"""FixUp and SkipInit ResNets against NumPy in float64, and how they start.

The references follow the papers and the released code; see
`tests.models.reference`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnet_jax.models import fixup_resnet, registry, skipinit_resnet
from tests.models.reference import (
  block_path,
  check_block,
  check_network,
  convolve,
  max_pool,
  plain_conv,
  relu,
  stages,
  statistics,
)

WIDTH, DEPTH, STRIDES = (16, 32, 64, 128), (1, 2, 1, 1), (1, 2, 2, 2)
BLOCKS = [
  ((2, 7, 8, 6), 16, 2, True),
  pytest.param((1, 7, 5, 6), 16, 1, True, marks=pytest.mark.slow),
  pytest.param((2, 3, 1, 16), 16, 1, False, marks=pytest.mark.slow),
]


def biased_conv(x, p, channels, size=1, stride=1):
  assert p['w'].shape == (size, size, x.shape[-1], channels)
  assert p['b'].shape == (channels,)
  return convolve(x, p['w'], stride) + p['b']


def fixup_block(x, params, path, channels, stride, transition):
  scalars, inner = params[path], channels // 4

  def p(name):
    return params[f'{path}/~/{name}']

  out = shortcut = x + scalars['bias1a']
  if transition:
    shortcut = plain_conv(out, p('conv_shortcut'), channels, 1, stride)
  out = relu(plain_conv(out, p('conv0'), inner) + scalars['bias1b'])
  out = plain_conv(out + scalars['bias2a'], p('conv1'), inner, 3, stride)
  out = relu(out + scalars['bias2b'])
  out = plain_conv(out + scalars['bias3a'], p('conv2'), channels)
  out = out * scalars['scale'] + scalars['bias3b']
  return relu(out + shortcut), out


def skipinit_block(x, params, path, channels, stride, transition):
  def p(name):
    return params[f'{path}/~/{name}']

  inner = channels // 4
  out, shortcut = relu(x), x
  if transition:
    shortcut = biased_conv(out, p('conv_shortcut'), channels, 1, stride)
  out = relu(biased_conv(out, p('conv0'), inner))
  out = relu(biased_conv(out, p('conv1'), inner, 3, stride))
  out = biased_conv(out, p('conv2'), channels)
  return shortcut + params[path]['skip_gain'] * out, out


@pytest.mark.parametrize(('shape', 'channels', 'stride', 'transition'), BLOCKS)
def test_fixup_block(shape, channels, stride, transition):
  def make():
    return fixup_resnet.FixUpBlock(
      channels,
      stride=stride,
      is_transition=transition,
      stochdepth_rate=0.0,
      num_blocks=5,
    )

  def expect(x, params, state):
    options = channels, stride, transition
    return *fixup_block(x, params, 'res_block', *options), {}

  check_block(make, expect, shape)


@pytest.mark.parametrize(('shape', 'channels', 'stride', 'transition'), BLOCKS)
def test_skipinit_block(shape, channels, stride, transition):
  def make():
    return skipinit_resnet.SkipInitBlock(
      channels, stride=stride, is_transition=transition, stochdepth_rate=0.0
    )

  def expect(x, params, state):
    options = channels, stride, transition
    return *skipinit_block(x, params, 'nf_res_block', *options), {}

  check_block(make, expect, shape)


def fixup_network(images, params, state):
  outputs, scalars = {}, params['FixUp_ResNet']
  x = plain_conv(images, params['FixUp_ResNet/~/initial_conv'], 8, 7, 2)
  x = max_pool(relu(x + scalars['bias1']))
  for index, row in enumerate(stages(WIDTH, DEPTH, STRIDES)):
    path = block_path('FixUp_ResNet', 'res_block', index)
    x, branch = fixup_block(x, params, path, *row)
    residual = statistics(branch)['var']
    outputs[f'block_{index}'] = {**statistics(x), 'residual_var': residual}
  return outputs, x + scalars['bias2'], params['FixUp_ResNet/~/linear']


def skipinit_network(images, params, state):
  outputs = {}
  x = plain_conv(images, params['SkipInit_ResNet/~/initial_conv'], 8, 7, 2)
  x = max_pool(x)
  for index, row in enumerate(stages(WIDTH, DEPTH, STRIDES)):
    path = block_path('SkipInit_ResNet', 'nf_res_block', index)
    x, branch = skipinit_block(x, params, path, *row)
    residual = statistics(branch)['var']
    outputs[f'block_{index}'] = {**statistics(x), 'residual_var': residual}
  return outputs, relu(x), params['SkipInit_ResNet/~/linear']


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'network'),
  [
    ('fixup_resnet_pico', fixup_network),
    ('skipinit_resnet_pico', skipinit_network),
  ],
)
def test_network(name, network):
  check_network(name, network, he_kernels=True)


def initial(name):
  model = registry.create_model(name, 10)
  init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), False))
  return init(jax.random.key(0))[0]


def test_fixup_starts_as_published():
  """Of the pico network: five blocks, bottlenecks of a quarter."""
  params = initial('fixup_resnet_pico')
  root = 'FixUp_ResNet/~/res_block_4'
  inner, scale = 32, 5**-0.25
  for path, std in (
    ('conv0', (2 / inner) ** 0.5 * scale),
    ('conv1', (2 / (9 * inner)) ** 0.5 * scale),
    ('conv2', 0),
    ('conv_shortcut', (2 / 128) ** 0.5),
  ):
    kernel = np.asarray(params[f'{root}/~/{path}']['w'])
    assert abs(kernel.std() - std) <= 0.05 * std
    assert abs(kernel.mean()) <= 0.1 * std
  scalars = {key: float(value) for key, value in params[root].items()}
  assert scalars.pop('scale') == 1
  assert set(scalars.values()) == {0}
  assert not np.any(params['FixUp_ResNet/~/linear']['w'])


def test_skipinit_starts_with_gains_of_0():
  params = initial('skipinit_resnet_pico')
  gains = [
    float(leaves['skip_gain'])
    for leaves in params.values()
    if 'skip_gain' in leaves
  ]
  assert gains == [0] * 5
  kernel = np.asarray(params['SkipInit_ResNet/~/nf_res_block_4/~/conv1']['w'])
  # Haiku's default: a normal distribution that is cut at two deviations.
  assert abs(kernel.std() * (9 * 32) ** 0.5 - 0.88) < 0.03
