"""Batch-normalised blocks and networks against NumPy in float64.

The references follow the papers; see `tests.models.reference`.
"""

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnet_jax.models import bn_nfnet, bn_resnet, efficientnet
from tests.models.reference import (
  avg_pool,
  block_path,
  check_block,
  check_network,
  gates,
  gelu,
  max_pool,
  Norms,
  plain_conv,
  random_images,
  relu,
  silu,
  stages,
  statistics,
)


def pre_activation_block(x, params, norm, path, channels, stride, transition):
  def p(name):
    return params[f'{path}/~/{name}']

  inner = channels // 4
  out, shortcut = relu(norm(x, f'{path}/~/bn0')), x
  if transition:
    shortcut = plain_conv(out, p('conv_shortcut'), channels, 1, stride)
  out = plain_conv(out, p('conv0'), inner)
  out = relu(norm(out, f'{path}/~/bn1'))
  out = plain_conv(out, p('conv1'), inner, 3, stride)
  out = relu(norm(out, f'{path}/~/bn2'))
  out = plain_conv(out, p('conv2'), channels)
  se = f'{path}/~/squeeze_excite'
  if f'{se}/~/linear' in params:
    out = gates(out, params, se, channels // 4) * out
  return shortcut + out, out


def post_activation_block(x, params, norm, path, channels, stride, transition):
  def p(name):
    return params[f'{path}/~/{name}']

  inner = channels // 4
  shortcut = x
  if transition:
    shortcut = plain_conv(x, p('conv_shortcut'), channels, 1, stride)
    shortcut = norm(shortcut, f'{path}/~/bn_shortcut')
  out = relu(norm(plain_conv(x, p('conv0'), inner), f'{path}/~/bn0'))
  out = plain_conv(out, p('conv1'), inner, 3, stride)
  out = relu(norm(out, f'{path}/~/bn1'))
  out = norm(plain_conv(out, p('conv2'), channels), f'{path}/~/bn2')
  se = f'{path}/~/squeeze_excite'
  if f'{se}/~/linear' in params:
    out = gates(out, params, se, channels // 16) * out
  return relu(shortcut + out), out


def bn_nfnet_block(x, params, norm, path, channels, stride, transition):
  def p(name):
    return params[f'{path}/~/{name}']

  inner, groups = channels // 2, channels // 8
  out, shortcut = gelu(norm(x, f'{path}/~/bn0')), x
  if transition:
    shortcut = avg_pool(out) if stride == 2 else out
    shortcut = plain_conv(shortcut, p('conv_shortcut'), channels)
  out = plain_conv(out, p('conv0'), inner)
  out = gelu(norm(out, f'{path}/~/bn1'))
  out = plain_conv(out, p('conv1'), inner, 3, stride, groups)
  out = gelu(norm(out, f'{path}/~/bn1b'))
  out = plain_conv(out, p('conv1b'), inner, 3, 1, groups)
  out = gelu(norm(out, f'{path}/~/bn2'))
  out = plain_conv(out, p('conv2'), channels)
  out = gates(out, params, f'{path}/~/squeeze_excite', inner) * out
  return shortcut + out, out


def mb_conv(x, params, norm, path, channels, size, stride, expansion):
  def p(name):
    return params[f'{path}/~/{name}']

  inner = x.shape[-1] * expansion
  out = x
  if expansion > 1:
    out = plain_conv(out, p('expand_conv'), inner)
    out = silu(norm(out, f'{path}/~/expand_bn'))
  out = plain_conv(out, p('depthwise_conv'), inner, size, stride, inner)
  out = silu(norm(out, f'{path}/~/depthwise_bn'))
  hidden = max(1, int(x.shape[-1] * 0.25))
  out = gates(out, params, f'{path}/~/squeeze_excite', hidden, silu) * out
  out = norm(
    plain_conv(out, p('project_conv'), channels), f'{path}/~/project_bn'
  )
  residual = stride == 1 and x.shape[-1] == channels
  return (x + out if residual else out), out


BLOCKS: dict[str, tuple[Callable[..., Any], str, Callable[..., Any], dict]] = {
  'v2': (bn_resnet.ResBlockV2, 'res_block_v2', pre_activation_block, {}),
  'v2 with SE': (
    bn_resnet.ResBlockV2,
    'res_block_v2',
    pre_activation_block,
    {'se_ratio': 0.25},
  ),
  'v1': (bn_resnet.ResBlockV1, 'res_block_v1', post_activation_block, {}),
  'v1 with SE': (
    bn_resnet.ResBlockV1,
    'res_block_v1',
    post_activation_block,
    {'se_ratio': 1 / 16},
  ),
  'NFNet': (bn_nfnet.BNBlock, 'bn_block', bn_nfnet_block, {'group_size': 4}),
}


@pytest.mark.parametrize('is_training', [True, False])
@pytest.mark.parametrize(
  ('kind', 'shape', 'channels', 'stride', 'transition'),
  [
    ('v2', (3, 8, 7, 6), 16, 2, True),
    ('v2 with SE', (2, 3, 3, 16), 16, 1, False),
    ('v1', (3, 8, 7, 6), 16, 2, True),
    ('v1 with SE', (2, 3, 3, 16), 16, 1, False),
    ('NFNet', (3, 8, 7, 6), 16, 2, True),
    ('NFNet', (2, 3, 3, 16), 16, 1, False),
  ],
)
def test_batch_normalised_block(
  kind, shape, channels, stride, transition, is_training
):
  block, path, expected_block, options = BLOCKS[kind]
  if block is not bn_nfnet.BNBlock:
    options = {'se_ratio': 0.0, **options}

  def make():
    return block(
      channels,
      stride=stride,
      is_transition=transition,
      stochdepth_rate=0.0,
      **options,
    )

  def expect(x, params, state):
    norm = Norms(params, state, is_training)
    out = expected_block(x, params, norm, path, channels, stride, transition)
    return *out, norm.next_state

  check_block(make, expect, shape, is_training, he_kernels=True)


@pytest.mark.parametrize('is_training', [True, False])
@pytest.mark.parametrize(
  ('shape', 'channels', 'size', 'stride', 'expansion'),
  [
    ((3, 8, 7, 8), 12, 5, 2, 6),
    ((2, 5, 4, 12), 12, 3, 1, 6),
    ((2, 4, 4, 8), 8, 3, 1, 1),
    ((2, 4, 4, 8), 12, 3, 1, 6),
  ],
)
def test_mb_conv(shape, channels, size, stride, expansion, is_training):
  def make():
    return efficientnet.MBConv(
      shape[-1],
      channels,
      kernel_size=size,
      stride=stride,
      expansion=expansion,
      stochdepth_rate=0.0,
    )

  def expect(x, params, state):
    norm = Norms(params, state, is_training)
    options = channels, size, stride, expansion
    return *mb_conv(x, params, norm, 'mb_conv', *options), norm.next_state

  check_block(make, expect, shape, is_training, he_kernels=True)


@pytest.mark.slow
def test_drop_connect_rescales_whole_branches():
  """Unlike the other families' stochastic depth."""

  def forward(x, rate):
    block = efficientnet.MBConv(
      8, 8, kernel_size=3, stride=1, expansion=2, stochdepth_rate=rate
    )
    return block(x, jax.random.key(0), jnp.arange(len(x)))[0] - x

  init, apply = hk.transform_with_state(forward)
  x = jnp.float32(random_images(64, 3, 3, 8))
  params, state = jax.jit(init, static_argnums=2)(jax.random.key(1), x, 0.0)
  branch, dropped = (
    jax.jit(apply, static_argnums=4)(params, state, None, x, rate)[0]
    for rate in (0.0, 0.75)
  )
  kept = np.abs(dropped).max((1, 2, 3)) > 0
  assert 4 < kept.sum() < 32
  expected = branch * (4 * kept)[:, None, None, None]
  np.testing.assert_allclose(dropped, expected, rtol=1e-4, atol=1e-4)


def test_efficientnet_averages_longer_than_resnets():
  norms = []

  def build():
    norms.append(efficientnet.EfficientNet(10, 'pico').final_bn)
    norms.append(bn_resnet.BNResNet(10, 'pico').final_bn)

  hk.transform_with_state(build).init(None)
  decays = [(norm.mean_ema.decay, norm.var_ema.decay) for norm in norms]
  assert decays == [(0.99, 0.99), (0.9, 0.9)]
  assert [norm.eps for norm in norms] == [1e-3, 1e-5]


RESNET = ((16, 32, 64, 128), (1, 2, 1, 1), (1, 2, 2, 2))


def bn_resnet_network(images, params, state):
  outputs, norm = {}, Norms(params, state, False)
  x = max_pool(plain_conv(images, params['ResNet/~/initial_conv'], 8, 7, 2))
  for index, row in enumerate(stages(*RESNET)):
    path = block_path('ResNet', 'res_block_v2', index)
    x, branch = pre_activation_block(x, params, norm, path, *row)
    residual = statistics(branch)['var']
    outputs[f'block_{index}'] = {**statistics(x), 'residual_var': residual}
  return outputs, relu(norm(x, 'ResNet/~/final_bn')), params['ResNet/~/linear']


def senet_network(images, params, state):
  outputs, norm = {}, Norms(params, state, False)
  x = plain_conv(images, params['ResNet/~/initial_conv'], 8, 7, 2)
  x = max_pool(relu(norm(x, 'ResNet/~/initial_bn')))
  for index, row in enumerate(stages(*RESNET)):
    path = block_path('ResNet', 'res_block_v1', index)
    x, branch = post_activation_block(x, params, norm, path, *row)
    residual = statistics(branch)['var']
    outputs[f'block_{index}'] = {**statistics(x), 'residual_var': residual}
  return outputs, x, params['ResNet/~/linear']


@pytest.mark.slow
def test_bn_resnet():
  check_network('bn_resnet_pico', bn_resnet_network, he_kernels=True)


@pytest.mark.slow
def test_senet():
  check_network('senet_pico', senet_network, he_kernels=True)
