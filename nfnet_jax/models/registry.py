"""The table of models: name -> module, native sizes, published figures."""

from collections.abc import Callable
import dataclasses
import difflib
from typing import NamedTuple

import haiku as hk
import jax

from nfnet_jax.models import nfnet


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """What is known of a model before building it.

  Attributes:
    name: registry name, such as 'nfnet_f0'.
    family: the Haiku module.
    variant: its variant.
    train_size: native pixels a side in training.
    test_size: native pixels a side in evaluation.
    augment_magnitude: RandAugment magnitude of the published recipe, 0 for
      none.
    reported_top1: ImageNet top-1 in percent as its authors report it, or None.
    source: where `reported_top1` stands.
  """

  name: str
  family: type[hk.Module]
  variant: str
  train_size: int
  test_size: int
  augment_magnitude: int = 0
  reported_top1: float | None = None
  source: str = ''


class Model(NamedTuple):
  """A model as pure functions, with its specification.

  Attributes:
    init: `(rng, images, is_training) -> (params, state)`.
    apply: `(params, state, rng, images, is_training, positions=None) ->
      (logits, state)`; `rng` may be None in evaluation.
    endpoints: like `apply`, returning a dict of intermediate statistics,
      pooled features and logits in place of the logits.
    spec: the model's row of the table.
  """

  init: Callable
  apply: Callable
  endpoints: Callable
  spec: ModelSpec


# arXiv 2102.06171, table 3; F6 was trained with SAM, F0 to F5 without.
_NFNET_TOP1 = (83.6, 84.7, 85.1, 85.7, 85.9, 86.0, 86.5)


def _nfnet_specs() -> list[ModelSpec]:
  reported = {f'f{index}': top1 for index, top1 in enumerate(_NFNET_TOP1)}
  return [
    ModelSpec(
      name=f'nfnet_{variant}',
      family=nfnet.NFNet,
      variant=variant,
      train_size=row.train_size,
      test_size=row.test_size,
      augment_magnitude=row.augment_magnitude,
      reported_top1=reported.get(variant),
      source='arXiv 2102.06171, table 3' if variant in reported else '',
    )
    for variant, row in nfnet.VARIANTS.items()
  ]


_SPECS = {spec.name: spec for spec in _nfnet_specs()}


def list_models() -> list[str]:
  """Returns the names that `create` takes.

  Example:
    >>> list_models()[0]
    'nfnet_f0'
  """
  return list(_SPECS)


def get_spec(name: str) -> ModelSpec:
  """Returns a model's row of the table.

  Raises:
    ValueError: if the name is unknown; the message has the nearest ones.
  """
  if name not in _SPECS:
    near = difflib.get_close_matches(name, _SPECS, n=3) or list(_SPECS)
    raise ValueError(f"Unknown model '{name}'; known: {', '.join(near)}.")
  return _SPECS[name]


def create(name: str, num_classes: int = 1000, **options) -> Model:
  """Builds a model of the table.

  Args:
    name: one of `list_models()`.
    num_classes: size of the logits.
    **options: passed to the family's module, such as `stochdepth_rate`.

  Returns:
    A `Model`: `init`, `apply`, `endpoints` and `spec`.

  Raises:
    ValueError: if the name is unknown.

  Example:
    >>> import jax.numpy as jnp
    >>> model = create('nfnet_pico', num_classes=10)
    >>> images = jnp.zeros((2, model.spec.test_size, model.spec.test_size, 3))
    >>> init = lambda key: model.init(key, images, False)
    >>> params, state = jax.eval_shape(init, jax.random.key(0))
    >>> params['NFNet/~/linear']['w'].shape
    (192, 10)
  """
  spec = get_spec(name)

  def make():
    module = spec.family(num_classes, spec.variant, **options)

    def forward(images: jax.Array, is_training: bool, positions=None):
      return module(images, is_training, positions)

    def endpoints(images: jax.Array, is_training: bool, positions=None):
      return module.endpoints(images, is_training, positions)

    return forward, (forward, endpoints)

  transformed = hk.multi_transform_with_state(make)
  return Model(transformed.init, *transformed.apply, spec)
