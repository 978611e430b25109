"""The other families against an independent reference in NumPy float64.

The references follow the papers of the families; see `tests.models.reference`.
"""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nfnet_jax
from nfnet_jax.models import (
  bn_nfnet,
  bn_resnet,
  efficientnet,
  layers,
  nf_regnet,
  nf_resnet,
)
from tests.models import reference
from tests.models.reference import (
  assert_equal,
  assert_statistics_equal,
  avg_pool,
  conv,
  gates,
  gelu,
  linear,
  max_pool,
  plain_conv,
  random_images,
  run,
  sigmoid,
  statistics,
)


def relu(x):
  return np.maximum(x, 0)


def silu(x):
  return x * sigmoid(x)


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


def check_block(make, expect, shape, is_training=False, he_kernels=False):
  """Compares a block's output, variance and state with those of `expect`."""

  def forward(x):
    # Rates are 0: the key says that this is training.
    key = jax.random.key(0) if is_training else None
    return make()(x, key, jnp.arange(len(x)))

  init, apply = hk.transform_with_state(forward)
  zeros = jnp.zeros(shape)
  params = reference.random_params(
    lambda key: init(key, zeros)[0], he_kernels=he_kernels
  )
  state = reference.random_state(
    jax.eval_shape(lambda key: init(key, zeros)[1], jax.random.key(0))
  )
  x = random_images(*shape)
  (out, variance), next_state = run(
    lambda p, s, x: apply(p, s, None, x), params, state, x
  )
  expected, branch, expected_state = expect(x, params, state)
  assert_equal(out, expected)
  assert_statistics_equal(variance, statistics(branch)['var'])
  for path, leaves in (expected_state or state).items():
    for name, value in leaves.items():
      np.testing.assert_allclose(
        np.squeeze(next_state[path][name]), np.squeeze(value), rtol=1e-9
      )


@pytest.mark.parametrize(
  ('shape', 'channels', 'stride', 'transition', 'se_ratio'),
  [
    ((2, 8, 8, 6), 16, 2, True, 0.0),
    ((1, 7, 5, 6), 16, 1, True, 0.25),
    ((2, 1, 3, 16), 16, 1, False, 0.0),
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
    ((1, 1, 1, 10), 10, 22, 2, True),
    ((2, 5, 3, 10), 10, 22, 1, False),
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


BLOCKS = {
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
    norm = reference.Norms(params, state, is_training)
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
    norm = reference.Norms(params, state, is_training)
    options = channels, size, stride, expansion
    return *mb_conv(x, params, norm, 'mb_conv', *options), norm.next_state

  check_block(make, expect, shape, is_training, he_kernels=True)


def stages(width, depth, strides):
  """Yields each block's channels, stride, whether it opens a stage."""
  for channels, blocks, stride in zip(width, depth, strides):
    for index in range(blocks):
      yield channels, stride if index == 0 else 1, index == 0


def nf_betas(depth, alpha=0.2):
  variance = 1.0
  for blocks in depth:
    for index in range(blocks):
      yield variance**-0.5
      variance = (1.0 if index == 0 else variance) + alpha**2


def block_path(root, name, index):
  return f'{root}/~/{name}' + (f'_{index}' if index else '')


RESNET = ((16, 32, 64, 128), (1, 2, 1, 1), (1, 2, 2, 2))


def nf_resnet_network(images, params, state):
  outputs = {}
  x = max_pool(conv(images, params['NF_ResNet/~/initial_conv'], 8, 7, 2))
  rows = zip(stages(*RESNET), nf_betas(RESNET[1]))
  for index, (row, beta) in enumerate(rows):
    path = block_path('NF_ResNet', 'nf_res_block', index)
    x, branch = nf_res_block(x, params, path, *row, beta, 0.2)
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
    x, branch = nf_reg_block(
      x, params, path, channels, expanded, *row, beta, 0.2
    )
    residual = statistics(branch)['var']
    outputs[f'block_{index}'] = {**statistics(x), 'residual_var': residual}
  x = scaled_silu(conv(x, params['NF_RegNet/~/final_conv'], 104))
  return outputs, x, params['NF_RegNet/~/linear']


def bn_resnet_network(images, params, state):
  outputs, norm = {}, reference.Norms(params, state, False)
  x = max_pool(plain_conv(images, params['ResNet/~/initial_conv'], 8, 7, 2))
  for index, row in enumerate(stages(*RESNET)):
    path = block_path('ResNet', 'res_block_v2', index)
    x, branch = pre_activation_block(x, params, norm, path, *row)
    residual = statistics(branch)['var']
    outputs[f'block_{index}'] = {**statistics(x), 'residual_var': residual}
  return outputs, relu(norm(x, 'ResNet/~/final_bn')), params['ResNet/~/linear']


def senet_network(images, params, state):
  outputs, norm = {}, reference.Norms(params, state, False)
  x = plain_conv(images, params['ResNet/~/initial_conv'], 8, 7, 2)
  x = max_pool(relu(norm(x, 'ResNet/~/initial_bn')))
  for index, row in enumerate(stages(*RESNET)):
    path = block_path('ResNet', 'res_block_v1', index)
    x, branch = post_activation_block(x, params, norm, path, *row)
    residual = statistics(branch)['var']
    outputs[f'block_{index}'] = {**statistics(x), 'residual_var': residual}
  return outputs, x, params['ResNet/~/linear']


NETWORKS = {
  'nf_resnet_pico': nf_resnet_network,
  'nf_regnet_pico': nf_regnet_network,
  'bn_resnet_pico': bn_resnet_network,
  'senet_pico': senet_network,
}


@pytest.mark.parametrize('name', NETWORKS)
def test_network(name):
  """Odd sizes, one image."""
  model = nfnet_jax.create(name, 5)
  images = random_images(1, 45, 35, 3)
  init = lambda key: model.init(key, jnp.zeros(images.shape), False)
  params = reference.random_params(
    lambda key: init(key)[0], he_kernels=not name.startswith('nf')
  )
  state = reference.random_state(jax.eval_shape(init, jax.random.key(0))[1])
  outputs, _ = run(
    lambda p, s, x: model.endpoints(p, s, None, x, False), params, state, images
  )
  expected, x, classifier = NETWORKS[name](images, params, state)
  assert_equal(outputs.pop('features'), x.mean((1, 2)))
  logits = linear(x.mean((1, 2)), classifier, 5)
  assert_equal(outputs.pop('logits'), logits)
  assert_statistics_equal(outputs, expected)
