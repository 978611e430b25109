"""timm's light NFNets against a reference in NumPy float64.

It follows timm's behaviour; see `tests.models.reference`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
import pytest

from nfnet_jax.models import layers, light_nfnet, registry
from tests.models import regenerate
from tests.models.reference import (
  avg_pool,
  block_path,
  check_block,
  check_network,
  gates,
  nf_betas,
  sigmoid,
  silu,
  stages,
  statistics,
)

GAMMA = 1.7881293297


def conv(x, p, channels, size=1, stride=1, groups=1):
  """Convolve with gamma in the kernel, and zeros alike on both sides."""
  w = p['w']
  assert w.shape == (size, size, x.shape[-1] // groups, channels)
  fan_in = np.prod(w.shape[:3])
  scale = p['gain'] * GAMMA / np.sqrt((w.var((0, 1, 2)) + 1e-5) * fan_in)
  kernel = (w - w.mean((0, 1, 2))) * scale
  pad = (size // 2, size // 2)
  x = np.pad(x, [(0, 0), pad, pad, (0, 0)])
  views = sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]
  parts = zip(np.split(views, groups, 3), np.split(kernel, groups, 3))
  outputs = [np.einsum('nhwcij,ijco->nhwo', *part) for part in parts]
  return np.concatenate(outputs, -1) + p['bias']


def eca(x, p, size):
  (w,) = p.values()
  assert w.shape == (size,)
  means = np.pad(x.mean((1, 2)), [(0, 0), (size // 2, size // 2)])
  mixed = sliding_window_view(means, size, 1) @ w
  return sigmoid(mixed)[:, None, None]


def block(x, params, path, channels, stride, transition, beta, group, size=0):
  """Compute a block; `size` is that of ECA's kernel, 0 for squeeze-excite."""

  def p(name):
    return params[f'{path}/~/{name}']

  inner = channels // 4
  out, shortcut = silu(x) * beta, x
  if transition:
    shortcut = avg_pool(out) if stride == 2 else out
    shortcut = conv(shortcut, p('conv_shortcut'), channels)
  groups = inner // group
  out = silu(conv(out, p('conv0'), inner))
  out = silu(conv(out, p('conv1'), inner, 3, stride, groups))
  out = silu(conv(out, p('conv1b'), inner, 3, 1, groups))
  out = conv(out, p('conv2'), channels)
  if size:
    attention = eca(out, p('eca'), size)
  else:
    attention = gates(out, params, f'{path}/~/squeeze_excite', channels // 4)
  out = 2 * attention * out
  return shortcut + 0.2 * out, out


@pytest.mark.parametrize(
  ('shape', 'stride', 'attention', 'size'),
  [
    ((2, 7, 8, 6), 2, 'eca', 3),
    pytest.param((1, 8, 5, 6), 2, 'se', 0, marks=pytest.mark.slow),
    pytest.param((2, 1, 3, 16), 1, 'se', 0, marks=pytest.mark.slow),
  ],
)
def test_block(shape, stride, attention, size):
  def make():
    conv = functools.partial(
      layers.ScaledWSConv2D,
      standardize=lambda w, gain: layers.standardize_as_timm(w, GAMMA * gain),
      convolve=functools.partial(layers.convolve, symmetric=True),
    )
    return light_nfnet.LightBlock(
      16,
      stride=stride,
      group_size=2,
      attention=attention,
      conv=conv,
      is_transition=shape[-1] != 16,
      activation=layers.ACTIVATIONS['silu'][0],
      alpha=0.2,
      beta=0.7,
      stochdepth_rate=0.0,
    )

  def expect(x, params, state):
    options = (16, stride, shape[-1] != 16, 0.7, 2, size)
    return *block(x, params, 'nf_block', *options), {}

  check_block(make, expect, shape)


def light_network(images, params, state):
  root, outputs, depth = 'LightNFNet', {}, (1, 1, 1, 1)
  x = images
  for i, (channels, stride) in enumerate(zip((4, 8, 16, 8), (2, 1, 1, 2))):
    p = params[f'{root}/~/stem_conv{i}']
    x = conv(silu(x) if i else x, p, channels, 3, stride)
  rows = zip(stages((16, 32, 96, 96), depth, (1, 2, 2, 2)), nf_betas(depth))
  for index, (row, beta) in enumerate(rows):
    path = block_path(root, 'nf_block', index)
    x, branch = block(x, params, path, *row, beta, group=4, size=3)
    residual = statistics(branch)['var']
    outputs[f'block_{index}'] = {**statistics(x), 'residual_var': residual}
  x = silu(conv(x, params[f'{root}/~/final_conv'], 192))
  return outputs, x, params[f'{root}/~/linear']


@pytest.mark.slow
def test_network():
  check_network('eca_nfnet_pico', light_network)


@pytest.mark.parametrize(
  ('name', 'sizes'),
  [('eca_nfnet_l0', {5}), ('eca_nfnet_pico', {3})],
)
def test_size_of_the_kernel_of_eca(name, sizes):
  params, _, _ = regenerate.trace(name)
  kernels = [p['w'].shape for path, p in params.items() if '/eca' in path]
  assert {size for (size,) in kernels} == sizes


def test_branches_start_at_zero():
  """They have no skip gain; the gain of their last convolution is zero."""
  model = registry.create_model('eca_nfnet_pico', 10)
  images = jnp.ones((1, 32, 32, 3))
  params, _ = model.init(jax.random.key(0), images, False)
  gains = {
    path.rpartition('/')[2]: set(map(float, leaves['gain']))
    for path, leaves in params.items()
    if 'gain' in leaves
  }
  assert gains.pop('conv2') == {0}
  assert set.union(*gains.values()) == {1}
