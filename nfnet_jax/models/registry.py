"""The table of models: name -> family, variant, native sizes, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import difflib
from typing import Any, NamedTuple

import haiku as hk
import jax

from nfnet_jax.models import (
  bn_nfnet,
  bn_resnet,
  classifier,
  efficientnet,
  fixup_resnet,
  light_nfnet,
  nf_regnet,
  nf_resnet,
  nfnet,
  skipinit_resnet,
)
from nfnet_jax.models.spec import ModelSpec, Option

__all__ = [
  'FAMILIES',
  'Model',
  'ModelSpec',
  'Option',
  'create',
  'create_model',
  'get_model_spec',
  'list_models',
  'register_model',
  'unregister_model',
]


class Model(NamedTuple):
  """A model as pure functions, with its specification.

  Attributes:
    init: `(rng, images, is_training) -> (params, state)`.
    apply: `(params, state, rng, images, is_training, positions=None,
      remat=False) -> (logits, state)`; `rng` may be None in evaluation.
    endpoints: as `apply` without `remat`; returns a dict of intermediate
      statistics, pooled features and logits in place of the logits.
    spec: the model's row of the table.
  """

  init: Callable[..., Any]
  apply: Callable[..., Any]
  endpoints: Callable[..., Any]
  spec: ModelSpec


def _numbered(prefix: str, variants: Mapping[str, Any]) -> dict[str, str]:
  """Map '50' to 'resnet50', but 'pico' to 'resnet_pico'."""
  return {v: prefix + '_' * (not v.isdigit()) + v for v in variants}


# Family -> variant -> registry name. A family's class defines everything else;
# see `classifier.ImageClassifier`.
FAMILIES: dict[type[classifier.ImageClassifier], dict[str, str]] = {
  nfnet.NFNet: {v: f'nfnet_{v}' for v in nfnet.VARIANTS},
  # The variants of table 6 of the paper, and a small one.
  bn_nfnet.BNNFNet: {
    v: f'nfnet_{v}_bn' for v in ('f0', 'f1', 'f2', 'f3', 'pico')
  },
  light_nfnet.LightNFNet: {v: v for v in light_nfnet.VARIANTS},
  nf_resnet.NFResNet: _numbered('nf_resnet', nf_resnet.VARIANTS),
  fixup_resnet.FixUpResNet: _numbered('fixup_resnet', nf_resnet.VARIANTS),
  skipinit_resnet.SkipInitResNet: _numbered(
    'skipinit_resnet', nf_resnet.VARIANTS
  ),
  nf_regnet.NFRegNet: {v: f'nf_regnet_{v}' for v in nf_regnet.VARIANTS},
  bn_resnet.BNResNet: _numbered('bn_resnet', bn_resnet.VARIANTS),
  bn_resnet.ResNetV1: {v: v for v in bn_resnet.VARIANTS_V1},
  efficientnet.EfficientNet: {
    v: f'efficientnet_{v}' for v in efficientnet.VARIANTS
  },
}
_SPECS: dict[str, ModelSpec] = {}


def register_model(
  name: str,
  family: type[classifier.ImageClassifier],
  variant: str,
  *,
  train_size: int,
  test_size: int,
  eval_crop: str | None = None,
  augment_magnitude: int = 0,
  reported_top1: float | None = None,
  source: str = '',
) -> ModelSpec:
  """Add a model to the table, for configs, weights and commands.

  Args:
    name: registry name.
    family: subclass of `ImageClassifier`, as described there.
    variant: one of its `variants`.
    train_size: native image size in training, pixels a side.
    test_size: native image size in evaluation, pixels a side.
    eval_crop: 'squash' or 'centre'; by default the family's.
    augment_magnitude: RandAugment magnitude of the recipe; 0 for no
      RandAugment.
    reported_top1: ImageNet top-1 in percent, if known.
    source: where it is reported.

  Returns:
    The new row of the table.

  Raises:
    ValueError: if the name is taken, the family has no such variant, or a size
      or the crop is not possible.

  Examples:
    >>> import dataclasses
    >>> class WideNFNet(nfnet.NFNet):
    ...   variants = {
    ...     'wide': dataclasses.replace(
    ...       nfnet.VARIANTS['pico'], width=(32, 64, 128, 256)
    ...     )
    ...   }
    >>> spec = register_model(
    ...   'nfnet_wide', WideNFNet, 'wide', train_size=64, test_size=96
    ... )
    >>> create_model('nfnet_wide', num_classes=10).spec.test_size
    96
    >>> unregister_model('nfnet_wide')
  """
  if name in _SPECS:
    raise ValueError(
      f"The model name '{name}' is taken by {_SPECS[name].family.__name__}. "
      'Choose another name.'
    )
  if variant not in family.variants:
    raise ValueError(
      f"{family.__name__} has no variant '{variant}'. Its variants are "
      f'{", ".join(family.variants)}.'
    )
  spec = ModelSpec(
    name=name,
    family=family,
    variant=variant,
    train_size=train_size,
    test_size=test_size,
    eval_crop=family.eval_crop if eval_crop is None else eval_crop,
    augment_magnitude=augment_magnitude,
    reported_top1=reported_top1,
    source=source,
  )
  _ = spec.preprocessing  # Checks its values.
  _SPECS[name] = spec
  return spec


def unregister_model(name: str) -> None:
  """Remove a model from the table, so that its name can be used again.

  Raises:
    ValueError: if the name is unknown.
  """
  get_model_spec(name)
  del _SPECS[name]


def _register_families() -> None:
  for family, names in FAMILIES.items():
    published: dict[str, dict[str, Any]] = {
      variant: {'reported_top1': top1, 'source': source}
      for source, rows in family.published_top1.items()
      for variant, top1 in rows.items()
    }
    for variant, name in names.items():
      row = family.variants[variant]
      register_model(
        name,
        family,
        variant,
        train_size=row.train_size,
        test_size=row.test_size,
        augment_magnitude=getattr(row, 'augment_magnitude', 0),
        **published.get(variant, {}),
      )


_register_families()


def list_models() -> list[str]:
  """Return the names that `create_model` takes.

  Examples:
    >>> list_models()[0]
    'nfnet_f0'
  """
  return list(_SPECS)


def get_model_spec(name: str) -> ModelSpec:
  """Return a model's row of the table.

  Raises:
    ValueError: if the name is unknown; the message has the nearest names.
  """
  if name in _SPECS:
    return _SPECS[name]
  if near := difflib.get_close_matches(name, _SPECS, n=3):
    hint = f'Did you mean {", ".join(near)}?'
  else:
    hint = f'Known models are {", ".join(_SPECS)}.'
  raise ValueError(f"Unknown model '{name}'. {hint}")


def create_model(name: str, num_classes: int = 1000, **options: Any) -> Model:
  """Create a model of the table.

  Args:
    name: one of `list_models()`.
    num_classes: size of the logits.
    **options: options and fast paths of the model's family, such as
      `stochdepth_rate`; see `ModelSpec.options`.

  Returns:
    A `Model`: `init`, `apply`, `endpoints` and `spec`.

  Raises:
    ValueError: if the name or an option is unknown.

  Examples:
    >>> import jax.numpy as jnp
    >>> model = create_model('nfnet_pico', num_classes=10)
    >>> images = jnp.zeros((2, model.spec.test_size, model.spec.test_size, 3))
    >>> init = lambda key: model.init(key, images, False)
    >>> params, state = jax.eval_shape(init, jax.random.key(0))
    >>> params['NFNet/~/linear']['w'].shape
    (192, 10)
  """
  spec = get_model_spec(name)
  known = [*spec.options, *sorted(spec.fast_paths)]
  for option in options:
    if option not in known:
      raise ValueError(
        f"'{name}' ({spec.family.__name__}) has no option '{option}'. Its "
        f'options are {", ".join(known)}.'
      )

  def make() -> tuple[Callable[..., Any], tuple[Callable[..., Any], ...]]:
    module = spec.family(num_classes, spec.variant, **options)

    def forward(
      images: jax.Array,
      is_training: bool,
      positions: jax.Array | None = None,
      remat: bool = False,
    ) -> jax.Array:
      return module(images, is_training, positions, remat)

    def endpoints(
      images: jax.Array,
      is_training: bool,
      positions: jax.Array | None = None,
    ) -> dict[str, Any]:
      return module.endpoints(images, is_training, positions)

    return forward, (forward, endpoints)

  transformed = hk.multi_transform_with_state(make)
  apply, endpoints = transformed.apply
  return Model(transformed.init, apply, endpoints, spec)


create = create_model
