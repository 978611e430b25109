"""Fold normalisation into plain kernels and biases, for inference.

In evaluation a standardised kernel is a constant. A batch normalisation is a
scale and an offset per channel, which the convolution just before it can
absorb. The folded network has the same modules and computes neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import haiku as hk
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
import jax.numpy as jnp
import numpy as np

from nfnet_jax.models import layers, registry

Leaves = Mapping[str, np.ndarray]
Params = Mapping[str, Leaves]

_Convolution = layers.ScaledWSConv2D | hk.Conv2D
_Traced = _Convolution | hk.BatchNorm


class Folded(NamedTuple):
  """A network for inference.

  Attributes:
    params: module path -> name -> float32 array. Convolutions hold `w` and,
      if there is something to add, `b [C]`; batch normalisations that follow
      no convolution hold `scale` and `offset [C]`; other modules are unchanged.
    apply: `(params, images) -> logits`, in evaluation, of normalised images
      `[N, H, W, 3]`.
    standardized: paths of the convolutions whose kernels were standardised.
    merged: paths of the batch normalisations that a convolution absorbed.
    kept: paths of those left as a scale and an offset.
  """

  params: dict[str, dict[str, np.ndarray]]
  apply: Callable[[Params, jax.Array], jax.Array]
  standardized: tuple[str, ...]
  merged: tuple[str, ...]
  kept: tuple[str, ...]


def fold(model: registry.Model, params: Params, model_state: Params) -> Folded:
  """Fold standardisation and running statistics into plain parameters.

  Which normalisation follows which convolution is found by tracing the model,
  so that any network of `ScaledWSConv2D`, `hk.Conv2D` and `hk.BatchNorm` works.
  Computes in float64.

  Args:
    model: see `registry.create`.
    params: its parameters.
    model_state: its running statistics; empty if it has none.

  Raises:
    ValueError: if a module is called twice, or if there is state that belongs
      to no batch normalisation.

  Examples:
    >>> model = registry.create('nfnet_pico', num_classes=10)
    >>> images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    >>> init = lambda key, images: model.init(key, images, False)
    >>> shapes = jax.eval_shape(init, jax.random.key(0), images)
    >>> params, state = jax.tree.map(lambda leaf: np.ones(leaf.shape), shapes)
    >>> folded = fold(model, params, state)
    >>> sorted(folded.params['NFNet/~/final_conv'])
    ['b', 'w']
    >>> jax.eval_shape(folded.apply, folded.params, images).shape
    (1, 10)
  """
  modules, followers = _trace(model, params, model_state)
  folded = {path: dict(leaves) for path, leaves in params.items()}
  standardized, norms = [], []
  for path, module in modules.items():
    if isinstance(module, layers.ScaledWSConv2D):
      folded[path] = _plain_convolution(module, params[path])
      standardized.append(path)
    elif isinstance(module, hk.BatchNorm):
      mean, var = (
        np.asarray(model_state[name]['average'], np.float64)
        for name in _statistics(path)
      )
      folded[path] = _affine(params[path], mean, var, module.eps)
      norms.append(path)
  for path, norm in followers.items():
    folded[path] = _merge(folded[path], folded.pop(norm))
  _check_no_other_state(model_state, norms)
  merged = tuple(followers.values())
  return Folded(
    jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), folded),
    functools.partial(_apply, model),
    tuple(standardized),
    merged,
    tuple(path for path in norms if path not in merged),
  )


def difference(
  model: registry.Model,
  params: Params,
  model_state: Params,
  folded: Folded,
  size: int,
) -> float:
  """Return the largest change of a logit, divided by the largest logit.

  Args:
    model: the network before folding; see `fold`.
    params: its parameters.
    model_state: its running statistics.
    folded: the folded network.
    size: side of the two random images that are compared, in pixels.
  """
  images = np.random.default_rng(0).normal(size=(2, size, size, 3))
  images = images.astype(np.float32)
  # TPUs and GPUs would round factors to fewer bits.
  with jax.default_matmul_precision('highest'):
    expected, _ = jax.jit(
      lambda *variables: model.apply(*variables, None, images, False)
    )(params, model_state)
    actual = jax.jit(folded.apply)(folded.params, images)
  expected, actual = np.float64(expected), np.float64(actual)
  return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def _apply(
  model: registry.Model, params: Mapping[str, Any], images: jax.Array
) -> jax.Array:
  """Run the network on folded parameters."""

  def plain(call, args, kwargs, context):
    module = context.module
    if context.method_name != '__call__':
      return call(*args, **kwargs)
    leaves = params.get(module.module_name, {})
    if isinstance(module, layers.ScaledWSConv2D):
      return module.convolve(args[0], leaves['w']) + leaves['b']
    if isinstance(module, hk.BatchNorm):
      return args[0] * leaves['scale'] + leaves['offset'] if leaves else args[0]
    if isinstance(module, hk.Conv2D):
      module.with_bias = 'b' in leaves
    return call(*args, **kwargs)

  with hk.intercept_methods(plain):
    return model.apply(params, {}, None, images, False)[0]


def _trace(
  model: registry.Model, params: Params, model_state: Params
) -> tuple[dict[str, _Traced], dict[str, str]]:
  """Find the convolutions and normalisations, and which follows which.

  Returns:
    Path -> module; and path of a convolution -> path of the normalisation that
    is the only user of its output.
  """
  modules: dict[str, _Traced] = {}

  def mark(call, args, kwargs, context):
    module = context.module
    if context.method_name != '__call__' or not isinstance(module, _Traced):
      return call(*args, **kwargs)
    path = module.module_name
    if path in modules:
      raise ValueError(f"'{path}' is called twice, so it cannot be folded.")
    modules[path] = module
    # A normalisation keeps the shape, so its input can replace its output.
    is_norm = isinstance(module, hk.BatchNorm)
    return checkpoint_name(args[0] if is_norm else call(*args, **kwargs), path)

  def forward(images):
    with hk.intercept_methods(mark):
      return model.apply(params, model_state, None, images, False)[0]

  size = model.spec.test_size
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  jaxpr = jax.make_jaxpr(forward)(image).jaxpr
  return modules, _followers(jaxpr, modules)


def _followers(
  jaxpr: core.Jaxpr, modules: Mapping[str, _Traced]
) -> dict[str, str]:
  """Map each convolution to the normalisation that is its only user, if any."""
  users = {variable: [''] for variable in jaxpr.outvars}
  marks = {}
  for equation in jaxpr.eqns:
    name = ''
    if equation.primitive.name == 'name':
      name = equation.params['name']
      marks[name] = equation.outvars[0]
    for variable in equation.invars:
      if isinstance(variable, core.Var):
        users.setdefault(variable, []).append(name)
  result = {}
  for path, output in marks.items():
    first, *others = users.get(output, [''])
    if (
      isinstance(modules[path], _Convolution)
      and not others
      and isinstance(modules.get(first), hk.BatchNorm)
    ):
      result[path] = first
  return result


def _plain_convolution(
  module: layers.ScaledWSConv2D, leaves: Leaves
) -> dict[str, np.ndarray]:
  cpu = jax.local_devices(backend='cpu')[0]
  standardize = jax.jit(module.standardize)
  with jax.enable_x64(True), jax.default_device(cpu):
    kernel = standardize(np.float64(leaves['w']), np.float64(leaves['gain']))
    return {
      'w': np.asarray(kernel),
      'b': np.asarray(leaves['bias'], np.float64),
    }


def _affine(
  leaves: Leaves, mean: np.ndarray, var: np.ndarray, eps: float
) -> dict[str, np.ndarray]:
  scale = np.float64(leaves['scale']) / np.sqrt(var + eps)
  offset = np.float64(leaves['offset']) - mean * scale
  return {'scale': scale.ravel(), 'offset': offset.ravel()}


def _merge(convolution: Leaves, affine: Leaves) -> dict[str, np.ndarray]:
  bias = np.float64(convolution.get('b', 0.0)) * affine['scale']
  return {
    'w': np.float64(convolution['w']) * affine['scale'],
    'b': bias + affine['offset'],
  }


def _statistics(norm: str) -> tuple[str, str]:
  """Return the paths of a normalisation's mean and variance."""
  return f'{norm}/~/mean_ema', f'{norm}/~/var_ema'


def _check_no_other_state(model_state: Params, norms: list[str]) -> None:
  known = {name for norm in norms for name in _statistics(norm)}
  if unknown := sorted(set(model_state) - known):
    raise ValueError(
      f"The state '{unknown[0]}' does not belong to a batch norm, so it cannot "
      'be folded.'
    )
