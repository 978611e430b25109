"""NFNet against an independent reference in plain NumPy float64.

The reference follows arXiv 2102.06171 and, where they differ, the behaviour of
the code its authors released. It shares nothing with the package.
"""

from collections.abc import Callable
import itertools
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnet_jax.models import layers, nfnet, registry
from tests.models import families
from tests.models.reference import (
  assert_equal,
  assert_statistics_equal,
  avg_pool,
  conv,
  elu,
  gates,
  gelu,
  linear,
  random_images,
  random_params,
  run,
  sigmoid,
  statistics,
)

CLASSES = 5
# Width, depth, channels per group, first three stem convolutions.
SMALL = {
  'nfnet_nano': ((32, 64, 192, 192), (1, 1, 3, 1), 16, (8, 16, 32)),
  'nfnet_pico': ((16, 32, 96, 96), (1, 1, 1, 1), 8, (4, 8, 16)),
  'nfnet_three_blocks': ((16, 32, 96, 96), (1, 2, 0, 0), 8, (4, 8, 16)),
}
# std^2 before each block of F0, stage by stage.
F0_VARIANCES = (
  *(1,),
  *(1.04, 1.04),
  *(1.08, 1.04, 1.08, 1.12, 1.16, 1.20),
  *(1.24, 1.04, 1.08),
)


ACTIVATIONS: dict[str, tuple[Callable[..., Any], float]] = {
  'celu': (elu, 1.2709268332),
  'elu': (elu, 1.2716004848),
  'gelu': (gelu, 1.7015043497),
  'identity': (lambda x: x, 1),
  'leaky_relu': (lambda x: np.where(x > 0, x, 0.01 * x), 1.7059034109),
  'log_sigmoid': (lambda x: -np.log1p(np.exp(-x)), 1.9193484783),
  'log_softmax': (lambda x: x - np.log(np.exp(x).sum()), 1.0002083778),
  'relu': (lambda x: np.maximum(x, 0), 1.7139588594),
  'relu6': (lambda x: np.clip(x, 0, 6), 1.7131484747),
  'selu': (lambda x: 1.0507009874 * elu(x, 1.6732632424), 1.0008515120),
  'sigmoid': (sigmoid, 4.8038353920),
  'silu': (lambda x: x * sigmoid(x), 1.7881293297),
  'soft_sign': (lambda x: x / (1 + np.abs(x)), 2.3388531208),
  'softplus': (lambda x: np.log1p(np.exp(x)), 1.9203323126),
  'tanh': (np.tanh, 1.5939117670),
}


def act(x):
  return gelu(x) * 1.7015043497


def block(
  x, params, path, group_size, channels, stride, transition, beta, alpha, keep=1
):
  """Return the block's output and its branch's average channel variance."""

  def p(name):
    return params[f'{path}/~/{name}']

  # Whole groups only, so that the bottleneck may be less than a half.
  groups = channels // 2 // group_size
  inner = groups * group_size
  out, shortcut = act(x) * beta, x
  if transition:
    shortcut = avg_pool(out) if stride == 2 else out
    shortcut = conv(shortcut, p('conv_shortcut'), channels)
  out = act(conv(out, p('conv0'), inner))
  out = act(conv(out, p('conv1'), inner, 3, stride, groups))
  if f'{path}/~/conv1b' in params:
    out = act(conv(out, p('conv1b'), inner, 3, 1, groups))
  out = conv(out, p('conv2'), channels)
  out = 2 * gates(out, params, f'{path}/~/squeeze_excite', channels // 2) * out
  scale = alpha * keep * params[path]['skip_gain']
  return shortcut + scale * out, out.var((0, 1, 2)).mean()


def plan(width, depth, alpha=0.2):
  """Yield each block's channels, stride, whether it opens a stage, beta."""
  variance = 1.0
  for channels, blocks, stride in zip(width, depth, (1, 2, 2, 2)):
    for index in range(blocks):
      first = index == 0
      yield channels, stride if first else 1, first, variance**-0.5
      variance = (1.0 if first else variance) + alpha**2


def network(images, params, spec, alpha=0.2, keep=None):
  """Compute the endpoints; `keep` has 1 or 0 for each block."""
  width, depth, group_size, stem = spec
  outputs, x = {}, images
  for index, stride in enumerate((2, 1, 1, 2)):
    x = act(x) if index else x
    channels = (*stem, width[0] // 2)[index]
    x = conv(x, params[f'NFNet/~/stem_conv{index}'], channels, 3, stride)
  for index, row in enumerate(plan(width, depth, alpha)):
    path = 'NFNet/~/nf_block' + (f'_{index}' if index else '')
    kept = 1 if keep is None else keep[index]
    options = *row, alpha, kept
    x, residual = block(x, params, path, group_size, *options)
    outputs[f'block_{index}'] = {**statistics(x), 'residual_var': residual}
  x = act(conv(x, params['NFNet/~/final_conv'], 2 * width[-1]))
  features = x.mean((1, 2))
  classifier = params['NFNet/~/linear']
  logits = linear(features, classifier, len(classifier['b']))
  return {**outputs, 'features': features, 'logits': logits}


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_scaled_activation(name):
  fun, gamma = ACTIVATIONS[name]
  x = np.linspace(-8, 8, 101)
  actual = run(layers.scaled_activation(name), x)
  # Some activations hold their own constants in float32.
  np.testing.assert_allclose(actual, fun(x) * gamma, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
  ('shape', 'channels', 'stride', 'transition', 'tiny_kernels', 'spatial'),
  [
    ((2, 7, 7, 6), 16, 2, True, False, 2),
    ((2, 1, 5, 6), 16, 2, True, True, 2),
    # XLA's pooling on CPUs counts a lone row or column twice, but only in
    # arrays of 4096 values or more.
    ((48, 1, 1, 96), 16, 2, True, False, 2),
    ((2, 5, 6, 32), 32, 1, False, False, 2),
    # Half of 28 is three and a half groups of 4: three stay.
    ((2, 6, 9, 6), 28, 2, True, False, 2),
    # The ablation's single 3x3 convolution.
    ((2, 5, 7, 6), 16, 2, True, False, 1),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ((2, 8, 8, 6), 16, 2, True, False, 2),
        ((16, 1, 35, 8), 16, 2, True, False, 2),
        ((2, 7, 4, 6), 32, 1, True, False, 2),
        ((2, 3, 3, 48), 48, 1, False, True, 2),
      )
    ),
  ],
)
def test_block(shape, channels, stride, transition, tiny_kernels, spatial):
  def forward(x):
    module = nfnet.NFBlock(
      channels,
      stride=stride,
      is_transition=transition,
      group_size=4,
      spatial_convs=spatial,
      activation=layers.scaled_activation('gelu'),
      alpha=0.3,
      beta=0.8,
      stochdepth_rate=0.1,
    )
    return module(x, None, jnp.arange(len(x)))

  init, apply = hk.transform(forward)
  params = random_params(lambda key: init(key, jnp.zeros(shape)), tiny_kernels)
  assert ('nf_block/~/conv1b' in params) == (spatial == 2)
  x = random_images(*shape)
  out, residual_var = run(lambda p, x: apply(p, None, x), params, x)
  options = channels, stride, transition, 0.8, 0.3
  expected, expected_var = block(x, params, 'nf_block', 4, *options)
  assert_equal(out, expected)
  assert_statistics_equal(residual_var, expected_var)


def create(name, classes=CLASSES, tiny_kernels=False, **options):
  model = registry.create_model(name, classes, **options)
  images = jnp.zeros((1, 32, 32, 3))
  init = lambda key: model.init(key, images, False)[0]
  return model, random_params(init, tiny_kernels)


@pytest.fixture(scope='module')
def small():
  """The name of a network of three blocks, of which two may be dropped."""
  with families.small_nfnet(depth=(1, 2, 0, 0)) as name:
    yield name


@pytest.mark.parametrize(
  ('name', 'shape', 'tiny_kernels', 'options'),
  [
    ('nfnet_three_blocks', (1, 45, 35, 3), True, {'alpha': 0.5}),
    pytest.param(
      'nfnet_nano', (2, 32, 32, 3), False, {}, marks=pytest.mark.slow
    ),
    pytest.param(
      'nfnet_pico',
      (1, 45, 35, 3),
      True,
      {'alpha': 0.5},
      marks=pytest.mark.slow,
    ),
  ],
)
@pytest.mark.usefixtures('small')
def test_network(name, shape, tiny_kernels, options):
  model, params = create(name, tiny_kernels=tiny_kernels, **options)
  images = random_images(*shape)
  outputs, state = run(
    lambda p, x: model.endpoints(p, {}, None, x, False), params, images
  )
  assert state == {}
  expected = network(images, params, SMALL[name], **options)
  for key in ('features', 'logits'):
    assert_equal(outputs.pop(key), expected.pop(key))
  assert_statistics_equal(outputs, expected)


@pytest.mark.slow
def test_bfloat16_is_close_to_float32(small):
  model, params = create(small)
  apply = jax.jit(lambda p, x: model.apply(p, {}, None, x, False)[0])
  inputs = params, random_images(4, 16, 16, 3)
  exact = apply(*jax.tree.map(jnp.float32, inputs))
  rounded = apply(*jax.tree.map(jnp.bfloat16, inputs))
  assert rounded.dtype == jnp.bfloat16
  error = jnp.linalg.norm(rounded.astype(jnp.float32) - exact)
  # About fifteen layers, each rounding to 2^-9.
  assert error < 15 * 2**-9 * jnp.linalg.norm(exact)


def create_training(name, classes=CLASSES, **options):
  model, params = create(name, classes, **options)

  def logits(params, seed, x, *positions):
    key = jax.random.key(seed)
    return model.apply(params, {}, key, x, True, *positions)[0]

  return params, jax.jit(logits)


def test_stochastic_depth_drops_whole_branches_unscaled(small):
  number = 1024
  params, logits = create_training(small, dropout_rate=0.0)
  # The first block has rate 0; there are four ways to drop the others.
  keeps = [(1, *keep) for keep in itertools.product((0, 1), repeat=2)]
  draws = []
  for image in random_images(2, 1, 9, 9, 3):
    actual = run(logits, params, 0, np.repeat(image, number, 0))
    ways = np.concatenate(
      [
        network(image, params, SMALL[small], keep=keep)['logits']
        for keep in keeps
      ]
    )
    draws.append(np.abs(actual[:, None] - ways).max(-1).argmin(1))
    assert_equal(actual, ways[draws[-1]])
  np.testing.assert_array_equal(*draws)
  rates = 0.25 * np.arange(3) / 3
  odds = np.where(keeps, 1 - rates, rates).prod(1)
  counts = np.bincount(draws[0], minlength=len(keeps))
  # Five standard deviations. Blocks that shared draws would not give products.
  bounds = 5 * np.sqrt(number * odds * (1 - odds))
  assert (np.abs(counts - number * odds) < bounds).all()


def test_dropout_rescales_pooled_features(small):
  params, logits = create_training(small, 192, stochdepth_rate=0.0)
  # The logits become the features after dropout.
  params['NFNet/~/linear'] = {'w': np.eye(192), 'b': np.zeros(192)}
  images = random_images(32, 9, 9, 3)
  actual = run(logits, params, 0, images)
  expected = network(images, params, SMALL[small])['features'] / 0.8
  assert_equal(actual, np.where(actual == 0, 0, expected))
  # Overall, by feature and by example: the variant's rate of 0.2, within five
  # standard deviations.
  for axis in (None, 0, 1):
    rates = (actual == 0).mean(axis)
    bound = 5 * np.sqrt(0.2 * 0.8 * np.size(rates) / actual.size)
    assert (np.abs(rates - 0.2) < bound).all()


def test_draws_depend_on_key_and_position_only(small):
  params, logits = create_training(small)
  images, positions = random_images(24, 9, 9, 3), np.arange(16)
  first = run(logits, params, 0, images[:16])
  order = np.random.default_rng(2).permutation(16)
  assert_equal(run(logits, params, 0, images[order], order), first[order])
  shifted = run(logits, params, 0, images[8:], positions + 8)
  assert_equal(shifted[:8], first[8:])
  same = np.repeat(images[:1], 16, 0)
  alike = run(logits, params, 0, same, np.full(16, 7))
  assert_equal(alike, np.repeat(alike[:1], 16, 0))
  assert (np.ptp(run(logits, params, 0, same, positions), 0) > 0).all()
  assert (run(logits, params, 1, images[:16]) != first).any()


def test_betas_of_f0():
  betas: list[float] = []
  hk.transform(
    lambda: betas.extend(block.beta for block in nfnet.NFNet().blocks)
  ).init(None)
  reference = [row[-1] for row in plan((256, 512, 1536, 1536), (1, 2, 6, 3))]
  for values in (betas, reference):
    np.testing.assert_allclose(np.power(values, -2.0), F0_VARIANCES, rtol=1e-12)
