"""NF-ResNet and NF-RegNet against a reference in NumPy float64.

The references follow the papers; see `tests.models.reference`.
"""

import pytest

from nfnet_jax.models import layers, nf_regnet, nf_resnet
from tests.models.reference import (
  avg_pool,
  block_path,
  check_block,
  check_network,
  conv,
  gates,
  max_pool,
  nf_betas,
  relu,
  silu,
  stages,
  statistics,
)


def scaled_relu(x):
  return relu(x) * 1.7139588594


def scaled_silu(x):
  return silu(x) * 1.7881293297


def nf_res_block(x, params, path, channels, stride, transition, beta, alpha):
  def p(name):
    return params[f'{path}/~/{name}']

  inner = channels // 4
  out, shortcut = scaled_relu(x) * beta, x
  if transition:
    shortcut = conv(out, p('conv_shortcut'), channels, 1, stride)
  out = scaled_relu(conv(out, p('conv0'), inner))
  out = scaled_relu(conv(out, p('conv1'), inner, 3, stride))
  out = conv(out, p('conv2'), channels)
  se = f'{path}/~/squeeze_excite'
  if f'{se}/~/linear' in params:
    out = 2 * gates(out, params, se, channels // 4) * out
  return shortcut + alpha * params[path]['skip_gain'] * out, out


def nf_reg_block(
  x, params, path, channels, expanded, stride, transition, beta, alpha
):
  def p(name):
    return params[f'{path}/~/{name}']

  inner = expanded - expanded % 8
  out, shortcut = scaled_silu(x) * beta, x
  if transition:
    shortcut = avg_pool(out) if stride == 2 else out
    shortcut = conv(shortcut, p('conv_shortcut'), channels)
  out = scaled_silu(conv(out, p('conv0'), inner))
  out = conv(out, p('conv1'), inner, 3, stride, inner // 8)
  out = 2 * gates(out, params, f'{path}/~/squeeze_excite', inner // 2) * out
  out = conv(scaled_silu(out), p('conv2'), channels)
  return shortcut + alpha * params[path]['skip_gain'] * out, out


@pytest.mark.parametrize(
  ('shape', 'channels', 'stride', 'transition', 'se_ratio'),
  [
    ((2, 7, 8, 6), 16, 2, True, 0.25),
    pytest.param((1, 7, 5, 6), 16, 1, True, 0.0, marks=pytest.mark.slow),
    pytest.param((2, 1, 3, 16), 16, 1, False, 0.0, marks=pytest.mark.slow),
  ],
)
def test_nf_resnet_block(shape, channels, stride, transition, se_ratio):
  def make():
    return nf_resnet.NFResBlock(
      channels,
      stride=stride,
      se_ratio=se_ratio,
      is_transition=transition,
      activation=layers.scaled_activation('relu'),
      alpha=0.3,
      beta=0.8,
      stochdepth_rate=0.0,
    )

  def expect(x, params, state):
    options = channels, stride, transition, 0.8, 0.3
    return *nf_res_block(x, params, 'nf_res_block', *options), {}

  check_block(make, expect, shape)


@pytest.mark.parametrize(
  ('shape', 'channels', 'expanded', 'stride', 'transition'),
  [
    ((2, 8, 7, 6), 10, 13, 2, True),
    pytest.param((1, 1, 1, 10), 10, 22, 2, True, marks=pytest.mark.slow),
    pytest.param((2, 5, 3, 10), 10, 22, 1, False, marks=pytest.mark.slow),
  ],
)
def test_nf_regnet_block(shape, channels, expanded, stride, transition):
  def make():
    return nf_regnet.NFRegBlock(
      channels,
      expanded=expanded,
      stride=stride,
      is_transition=transition,
      activation=layers.scaled_activation('silu'),
      alpha=0.3,
      beta=0.8,
      stochdepth_rate=0.0,
    )

  def expect(x, params, state):
    options = channels, expanded, stride, transition, 0.8, 0.3
    return *nf_reg_block(x, params, 'nf_block', *options), {}

  check_block(make, expect, shape)


def nf_resnet_network(images, params, state):
  outputs, depth = {}, (1, 2, 1, 1)
  x = max_pool(conv(images, params['NF_ResNet/~/initial_conv'], 8, 7, 2))
  rows = zip(stages((16, 32, 64, 128), depth, (1, 2, 2, 2)), nf_betas(depth))
  for index, (row, beta) in enumerate(rows):
    path = block_path('NF_ResNet', 'nf_res_block', index)
    options = *row, beta, 0.2
    x, branch = nf_res_block(x, params, path, *options)
    residual = statistics(branch)['var']
    outputs[f'block_{index}'] = {**statistics(x), 'residual_var': residual}
  return outputs, scaled_relu(x), params['NF_ResNet/~/linear']


def nf_regnet_network(images, params, state):
  outputs, depth = {}, (1, 2, 1, 1)
  x = conv(images, params['NF_RegNet/~/initial_conv'], 12, 3, 2)
  rows = zip(stages((12, 18, 24, 36), depth, (2, 2, 2, 2)), nf_betas(depth))
  for index, ((channels, *row), beta) in enumerate(rows):
    path = block_path('NF_RegNet', 'nf_block', index)
    expanded = int(x.shape[-1] * (2.25 if index else 1))
    options = channels, expanded, *row, beta, 0.2
    x, branch = nf_reg_block(x, params, path, *options)
    residual = statistics(branch)['var']
    outputs[f'block_{index}'] = {**statistics(x), 'residual_var': residual}
  x = scaled_silu(conv(x, params['NF_RegNet/~/final_conv'], 104))
  return outputs, x, params['NF_RegNet/~/linear']


def test_nf_resnet():
  check_network('nf_resnet_pico', nf_resnet_network)


@pytest.mark.slow
def test_nf_regnet():
  check_network('nf_regnet_pico', nf_regnet_network)
