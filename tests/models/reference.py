"""Parts of the networks in plain NumPy float64, and comparisons with them.

They follow the papers and, where they differ, the behaviour of the code their
authors released. They share nothing with the package.
"""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from nfnet_jax.models import registry


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def relu(x):
  return np.maximum(x, 0)


def silu(x):
  return x * sigmoid(x)


def elu(x, scale=1.0):
  return np.where(x > 0, x, scale * np.expm1(np.minimum(x, 0)))


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def windows(x, size, stride, fill):
  """Return the SAME windows `[N, H, W, C, size, size]`."""
  pads = [(0, 0)]
  for side in x.shape[1:3]:
    total = max((-(-side // stride) - 1) * stride + size - side, 0)
    pads.append((total // 2, total - total // 2))
  x = np.pad(x, [*pads, (0, 0)], constant_values=fill)
  return sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]


def convolve(x, w, stride=1, groups=1):
  kernels = np.split(w, groups, 3)
  views = np.split(windows(x, w.shape[0], stride, 0.0), groups, 3)
  out = [
    np.einsum('nhwcij,ijco->nhwo', view, kernel, optimize=True)
    for view, kernel in zip(views, kernels)
  ]
  return np.concatenate(out, -1)


def conv(x, p, channels, size=1, stride=1, groups=1):
  """Scaled weight-standardised convolution."""
  w = p['w']
  assert w.shape == (size, size, x.shape[-1] // groups, channels)
  assert p['gain'].shape == p['bias'].shape == (channels,)
  fan_in = np.prod(w.shape[:3])
  scale = p['gain'] / np.sqrt(np.maximum(w.var((0, 1, 2)) * fan_in, 1e-4))
  standardized = (w - w.mean((0, 1, 2))) * scale
  return convolve(x, standardized, stride, groups) + p['bias']


def plain_conv(x, p, channels, size=1, stride=1, groups=1):
  """Convolution without bias."""
  assert set(p) == {'w'}
  assert p['w'].shape == (size, size, x.shape[-1] // groups, channels)
  return convolve(x, p['w'], stride, groups)


def max_pool(x):
  return windows(x, 3, 2, -np.inf).max((-2, -1))


def avg_pool(x):
  """Padding does not count in the average."""
  return np.nanmean(windows(x, 2, 2, np.nan), (-2, -1))


def linear(x, p, channels):
  assert p['w'].shape == (x.shape[-1], channels)
  assert p['b'].shape == (channels,)
  return x @ p['w'] + p['b']


def gates(x, params, path, hidden, act=relu):
  """Compute the gates of squeeze-excite."""
  out = linear(x.mean((1, 2)), params[f'{path}/~/linear'], hidden)
  out = linear(act(out), params[f'{path}/~/linear_1'], x.shape[-1])
  return sigmoid(out)[:, None, None]


def statistics(x):
  return {
    'sq_mean': (x.mean((0, 1, 2)) ** 2).mean(),
    'var': x.var((0, 1, 2)).mean(),
  }


class Norms:
  """Batch normalisations by path; training collects the state that follows."""

  def __init__(self, params, state, is_training, eps=1e-5, decay=0.9):
    self.params, self.state, self.is_training = params, state, is_training
    self.eps, self.decay = eps, decay
    self.next_state = {}

  def __call__(self, x, path):
    keys = [f'{path}/~/{name}_ema' for name in ('mean', 'var')]
    if self.is_training:
      mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
      self.next_state.update(
        (key, self._move(self.state[key], value))
        for key, value in zip(keys, (mean, var))
      )
    else:
      mean, var = (self.state[key]['average'] for key in keys)
    p = self.params[path]
    assert p['scale'].shape == p['offset'].shape == (1, 1, 1, x.shape[-1])
    return (x - mean) / np.sqrt(var + self.eps) * p['scale'] + p['offset']

  def _move(self, old, value):
    counter = old['counter'] + 1
    hidden = old['hidden'] * self.decay + value * (1 - self.decay)
    average = hidden / (1 - self.decay**counter)
    return {'counter': counter, 'hidden': hidden, 'average': average}


def random_params(init, tiny_kernels=False, he_kernels=False):
  """Draw all parameters that `init(key)` makes, far from initial values."""
  rng = np.random.default_rng(0)

  def draw(path, shape):
    x = rng.normal(size=shape)
    if path[-1].key in ('gain', 'skip_gain', 'scale'):
      return 1 + 0.3 * x
    if path[-1].key != 'w':
      return 0.3 * x
    if len(shape) == 2:
      return (x + 0.2) / np.sqrt(shape[0])
    if he_kernels:
      return x * np.sqrt(2 / np.prod(shape[:3]))
    # Variance times fan-in is on both sides of the lower bound of 1e-4.
    scale = np.geomspace(1e-5, 1, shape[-1]) if tiny_kernels else 1
    return (x + 0.2) * scale

  params = jax.eval_shape(init, jax.random.key(0))
  return jax.tree_util.tree_map_with_path(lambda k, x: draw(k, x.shape), params)


def random_state(shapes):
  """Draw running statistics as after three steps."""
  rng = np.random.default_rng(2)

  def draw(path, shape):
    if path[-1].key == 'counter':
      return np.int32(3)
    x = rng.normal(size=shape)
    return 0.3 * x if 'mean_ema' in path[0].key else np.exp(0.3 * x)

  return jax.tree_util.tree_map_with_path(lambda k, x: draw(k, x.shape), shapes)


def random_images(*shape):
  return np.random.default_rng(1).normal(size=shape)


def run(fun, *args):
  """Run `fun` jitted in float64; the mode ends with the call."""
  with jax.enable_x64(True):
    return jax.tree.map(np.asarray, jax.jit(fun)(*args))


def assert_equal(actual, desired):
  # Both sides are float64 throughout: some hundred roundings of 1e-16, relative
  # to the largest value because sums cancel.
  assert actual.dtype == np.float64
  scale = np.abs(desired).max()
  np.testing.assert_allclose(actual, desired, rtol=0, atol=1e-11 * scale)


def assert_statistics_equal(actual, desired):
  # These are computed in float32.
  check = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5)
  jax.tree.map(check, actual, desired)


def check_block(make, expect, shape, is_training=False, he_kernels=False):
  """Compare a block's output, variance and state with those of `expect`."""

  def forward(x):
    # Rates are 0; the key only means that this is training.
    key = jax.random.key(0) if is_training else None
    return make()(x, key, jnp.arange(len(x)))

  init, apply = hk.transform_with_state(forward)
  zeros = jnp.zeros(shape)
  params = random_params(lambda key: init(key, zeros)[0], he_kernels=he_kernels)
  state = random_state(
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


def stages(width, depth, strides):
  """Yield each block's channels, stride, whether it opens a stage."""
  for channels, blocks, stride in zip(width, depth, strides):
    for index in range(blocks):
      yield channels, stride if index == 0 else 1, index == 0


def nf_betas(depth, alpha=0.2):
  """Yield 1 / the standard deviation expected at each block's input."""
  variance = 1.0
  for blocks in depth:
    for index in range(blocks):
      yield variance**-0.5
      variance = (1.0 if index == 0 else variance) + alpha**2


def block_path(root, name, index):
  return f'{root}/~/{name}' + (f'_{index}' if index else '')


def check_network(name, network, he_kernels=False):
  """Compare a miniature's endpoints in evaluation, on an image of odd sides.

  `network` maps images, parameters and state to the blocks' statistics, the
  input of the pooling, and the classifier's parameters.
  """
  model = registry.create_model(name, 5)
  images = random_images(1, 45, 35, 3)
  init = lambda key: model.init(key, jnp.zeros(images.shape), False)
  params = random_params(lambda key: init(key)[0], he_kernels=he_kernels)
  state = random_state(jax.eval_shape(init, jax.random.key(0))[1])
  outputs, _ = run(
    lambda p, s, x: model.endpoints(p, s, None, x, False), params, state, images
  )
  expected, x, classifier = network(images, params, state)
  assert_equal(outputs.pop('features'), x.mean((1, 2)))
  logits = linear(x.mean((1, 2)), classifier, 5)
  assert_equal(outputs.pop('logits'), logits)
  assert_statistics_equal(outputs, expected)
