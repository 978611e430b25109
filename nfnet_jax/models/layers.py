"""Layers that the families share.

Scaled weight standardisation, gamma-scaled activations, squeeze-excite and
stochastic depth, as in Brock et al., "High-Performance Large-Scale Image
Recognition Without Normalization" (arXiv 2102.06171) and the code its authors
released. Images and activations are NHWC, kernels HWIO.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
import contextlib
import contextvars
import functools

import haiku as hk
import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

Activation = Callable[[jax.Array], jax.Array]

# g and gamma, with gamma = 1 / std(g(z)) for a unit Gaussian z. The gammas are
# the authors' sampled estimates, about 0.05 % above the exact values; published
# weights were trained with these digits.
ACTIVATIONS: dict[str, tuple[Activation, float]] = {
  'celu': (jax.nn.celu, 1.2709268332),
  'elu': (jax.nn.elu, 1.2716004848),
  'gelu': (jax.nn.gelu, 1.7015043497),  # The tanh approximation.
  'gelu_erf': (functools.partial(jax.nn.gelu, approximate=False), 1.7015043497),
  'glu': (jax.nn.glu, 1.8484294415),  # Halves the channels.
  'identity': (lambda x: x, 1.0),
  'leaky_relu': (jax.nn.leaky_relu, 1.7059034109),
  'log_sigmoid': (jax.nn.log_sigmoid, 1.9193484783),
  'log_softmax': (jax.nn.log_softmax, 1.0002083778),
  'relu': (jax.nn.relu, 1.7139588594),
  'relu6': (jax.nn.relu6, 1.7131484747),
  'selu': (jax.nn.selu, 1.0008515120),
  'sigmoid': (jax.nn.sigmoid, 4.8038353920),
  'silu': (jax.nn.silu, 1.7881293297),
  'soft_sign': (jax.nn.soft_sign, 2.3388531208),
  'softplus': (jax.nn.softplus, 1.9203323126),
  'tanh': (jnp.tanh, 1.5939117670),
}
# Activations whose output for a channel depends on the other channels too.
ACROSS_CHANNELS = 'glu', 'log_softmax'


def scaled_activation(name: str) -> Activation:
  """Return `gamma * g`, which keeps the variance of a unit Gaussian at 1.

  Args:
    name: a key of `ACTIVATIONS`.

  Raises:
    ValueError: if the name is unknown; the message lists the known ones.

  Examples:
    >>> act = scaled_activation('gelu')
    >>> act(jnp.zeros((2,)))
    Array([0., 0.], dtype=float32)

  Source: arXiv 2102.06171, section 2.
  """
  function, gamma = activation_and_gamma(name)
  return lambda x: function(x) * gamma


def activation_and_gamma(name: str) -> tuple[Activation, float]:
  """Return g and gamma of `ACTIVATIONS`.

  Raises:
    ValueError: if the name is unknown; the message lists the known ones.
  """
  if name not in ACTIVATIONS:
    raise ValueError(
      f"Unknown activation '{name}'; known: {', '.join(sorted(ACTIVATIONS))}."
    )
  return ACTIVATIONS[name]


def gamma(function: Activation) -> float:
  """Compute `1 / std(function(z))` for a unit Gaussian z, by quadrature.

  Args:
    function: elementwise on `[M]` arrays of float32.

  Returns:
    The constant with which `gamma * function` keeps the variance of unit
    Gaussian input, to about 1e-5.

  Examples:
    >>> round(gamma(jax.nn.relu), 4)  # sqrt(2 / (1 - 1 / pi))
    1.7129

  Source: arXiv 2102.06171, section 2. The authors sampled their constants,
  which are in `ACTIVATIONS`.
  """
  # The trapezoid rule on a grid with a point at the kink of ReLU, which a
  # Gauss-Hermite rule of any practical order misses by 1e-3.
  z = np.linspace(-12, 12, 24_001)
  weights = np.exp(-(z**2) / 2)
  weights /= np.sum(weights)
  values = np.asarray(function(jnp.asarray(z, jnp.float32)), np.float64)
  mean = np.sum(weights * values)
  return float(np.sum(weights * (values - mean) ** 2) ** -0.5)


@jax.named_scope('standardize')
def standardize(w: jax.Array, gain: jax.Array, eps: float = 1e-4) -> jax.Array:
  """Centre and scale a kernel so that each output unit has unit variance.

  Args:
    w: kernel `[H, W, I, O]`; `I` is the fan-in of one group.
    gain: `[O]`, learnt.
    eps: lower bound of `fan_in * var(w)`.

  Returns:
    `gain * (w - mean) / sqrt(max(fan_in * var, eps))`, in the dtype of `w`,
    with mean and (biased) variance over `H, W, I`.

  Source: arXiv 2102.06171, section 2; the paper has no eps, the code does.
  """
  axes = tuple(range(w.ndim - 1))
  fan_in = w.size // w.shape[-1]
  mean = jnp.mean(w, axes)
  scale = gain * lax.rsqrt(jnp.maximum(jnp.var(w, axes) * fan_in, eps))
  return (w - mean) * scale


def standardize_as_timm(
  w: jax.Array, gain: jax.Array, eps: float = 1e-5
) -> jax.Array:
  """Standardise a kernel as timm's `dm_nfnet_*` do; see `standardize`.

  Returns:
    `gain * (w - mean) / sqrt(fan_in * (var + eps))`: eps is added to every
    variance, and therefore shrinks every kernel a little.
  """
  axes = tuple(range(w.ndim - 1))
  fan_in = w.size // w.shape[-1]
  scale = gain * lax.rsqrt((jnp.var(w, axes) + eps) * fan_in)
  return (w - jnp.mean(w, axes)) * scale


# Modules whose kernels are standardised before the model is applied.
_standardized: contextvars.ContextVar[Container[str]] = contextvars.ContextVar(
  'standardized', default=()
)


@contextlib.contextmanager
def kernels_are_standardized(modules: Container[str]) -> Iterator[None]:
  """Make convolutions use their kernels unchanged.

  Args:
    modules: names of the `ScaledWSConv2D` modules that are applied to kernels
      which are standardised already.
  """
  token = _standardized.set(modules)
  try:
    yield
  finally:
    _standardized.reset(token)


def convolve(
  x: jax.Array,
  kernel: jax.Array,
  stride: int,
  groups: int,
  symmetric: bool = False,
) -> jax.Array:
  """Convolve images to `[N, ceil(H / stride), ceil(W / stride), O]`.

  Args:
    x: `[N, H, W, I]`.
    kernel: `[H, W, I / groups, O]`, of odd height and width.
    stride: pixels between windows.
    groups: channel groups; group i of the outputs sees only group i of the
      inputs.
    symmetric: whether zeros are padded alike on both sides, as PyTorch does.
      SAME padding has one less at the start if stride and side are even.
  """
  padding: str | list[tuple[int, int]] = 'SAME'
  if symmetric:
    padding = [(size // 2, size // 2) for size in kernel.shape[:2]]
  return lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(stride, stride),
    padding=padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )


class ScaledWSConv2D(hk.Module):
  """Convolution with scaled weight standardisation, a gain and a bias.

  Maps `[N, H, W, I]` to `[N, ceil(H / stride), ceil(W / stride), O]`, with SAME
  padding. Parameters: `w [kernel, kernel, I / groups, O]`, `gain [O]`,
  `bias [O]`.
  """

  def __init__(
    self,
    output_channels: int,
    kernel_size: int,
    stride: int = 1,
    groups: int = 1,
    standardize: Callable[[jax.Array, jax.Array], jax.Array] = standardize,
    convolve: Callable[[jax.Array, jax.Array, int, int], jax.Array] = convolve,
    gain: float = 1.0,
    name: str | None = None,
  ):
    super().__init__(name=name)
    self.output_channels = output_channels
    self.kernel_size = kernel_size
    self.stride = stride
    self.groups = groups
    self.standardize = standardize
    self._convolve = convolve
    self.initial_gain = gain

  def __call__(self, x: jax.Array) -> jax.Array:
    """Convolve and add the bias."""
    kernel, bias = self.parameters(x.shape[-1], x.dtype)
    return self.convolve(x, kernel) + bias

  def parameters(
    self, input_channels: int, dtype: DTypeLike
  ) -> tuple[jax.Array, jax.Array]:
    """Return the standardised kernel and the bias."""
    units = self.output_channels
    shape = (self.kernel_size,) * 2 + (input_channels // self.groups, units)
    init = hk.initializers.VarianceScaling(1.0, 'fan_in', 'normal')
    w = hk.get_parameter('w', shape, dtype, init=init)
    constant = hk.initializers.Constant(self.initial_gain)
    gain = hk.get_parameter('gain', (units,), dtype, init=constant)
    bias = hk.get_parameter('bias', (units,), dtype, init=jnp.zeros)
    if self.module_name in _standardized.get():
      return w, bias
    return self.standardize(w, gain), bias

  def convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve with a standardised kernel, without the bias."""
    return self._convolve(x, kernel, self.stride, self.groups)


def max_pool(x: jax.Array) -> jax.Array:
  """Take the maximum of 3 x 3 pixels with stride 2, as ResNets' stems do."""
  return hk.max_pool(x, (1, 3, 3, 1), (1, 2, 2, 1), 'SAME')


class SqueezeExcite(hk.Module):
  """A small network on the spatial mean that computes gates of the channels.

  Maps `[N, H, W, C]` to gates `[N, 1, 1, C]` in (0, 1). The inner activation of
  NFNets is a ReLU without gamma: the paper's appendix C has a scaled
  nonlinearity, but the published weights were trained with ReLU.
  """

  def __init__(
    self,
    channels: int,
    hidden: int,
    activation: Activation = jax.nn.relu,
    name: str | None = None,
  ):
    super().__init__(name=name)
    self.reduce = hk.Linear(hidden, name='linear')
    self.activation = activation
    self.expand = hk.Linear(channels, name='linear_1')

  def __call__(self, x: jax.Array) -> jax.Array:
    """Compute the gates of `[N, H, W, C]`."""
    return self.gates(jnp.mean(x, axis=(1, 2)))[:, None, None, :]

  def gates(self, pooled: jax.Array) -> jax.Array:
    """Map spatial means `[N, C]` to gates `[N, C]`."""
    return jax.nn.sigmoid(self.expand(self.activation(self.reduce(pooled))))


def optional_squeeze_excite(
  channels: int, ratio: float
) -> SqueezeExcite | None:
  """Return `SqueezeExcite` with `channels * ratio` hidden units; None for 0."""
  if ratio == 0:
    return None
  hidden = int(channels * ratio)
  return SqueezeExcite(channels, hidden, name='squeeze_excite')


def example_keys(key: jax.Array, positions: jax.Array) -> jax.Array:
  """Derive one random key per example from its position in the global batch.

  Args:
    key: a key derived from the seed, the step and what is drawn.
    positions: `[N]` integers; the example's index in the global batch, so that
      one device and eight draw the same numbers for the same example.
  """
  return jax.vmap(lambda position: jax.random.fold_in(key, position))(positions)


def stochastic_depth(
  x: jax.Array,
  rate: float,
  key: jax.Array | None,
  positions: jax.Array,
  rescale: bool = False,
) -> jax.Array:
  """Zero whole examples of a residual branch with probability `rate`.

  By default survivors are *not* scaled by `1 / (1 - rate)`, and nothing is
  scaled in evaluation: the published networks were trained like this, unlike
  most other implementations of stochastic depth.

  Args:
    x: branch output `[N, H, W, C]`.
    rate: probability of dropping an example.
    key: random key of this block and step; None in evaluation.
    positions: `[N]`, see `example_keys`.
    rescale: whether to scale survivors, as EfficientNet's drop-connect does.
  """
  if rate == 0 or key is None:
    return x
  scale = 1 / (1 - rate) if rescale else 1.0
  keep = scale * survivors(rate, key, positions).astype(x.dtype)
  return x * keep[:, None, None, None]


def survivors(rate: float, key: jax.Array, positions: jax.Array) -> jax.Array:
  """Draw which examples `[N]` stochastic depth keeps."""
  draws = jax.vmap(jax.random.uniform)(example_keys(key, positions))
  return draws >= rate


def dropout(
  x: jax.Array, rate: float, key: jax.Array, positions: jax.Array
) -> jax.Array:
  """Zero features `[N, C]` with probability `rate`, rescaling the rest."""
  if rate == 0:
    return x
  keys = example_keys(key, positions)
  draws = jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:]))(keys)
  return jnp.where(draws >= rate, x / (1 - rate), 0).astype(x.dtype)


def signal_statistics(x: jax.Array) -> dict[str, jax.Array]:
  """Compute the average channel squared mean and variance of `[N, H, W, C]`.

  Source: the signal propagation plots of arXiv 2101.08692, section 3.
  """
  axes = tuple(range(x.ndim - 1))
  x = x.astype(jnp.float32)
  return {
    'sq_mean': jnp.mean(jnp.square(jnp.mean(x, axes))),
    'var': jnp.mean(jnp.var(x, axes)),
  }
