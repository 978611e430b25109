"""The table of models: name -> module, native sizes, published figures."""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import difflib
import inspect
from typing import Any, NamedTuple

import haiku as hk
import jax

from nfnet_jax import preprocessing
from nfnet_jax.models import (
  bn_nfnet,
  bn_resnet,
  efficientnet,
  nf_regnet,
  nf_resnet,
  nfnet,
)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """What is known of a model before building it.

  Attributes:
    name: registry name, such as 'nfnet_f0'.
    family: the Haiku module.
    variant: its variant.
    train_size: native pixels a side in training.
    test_size: native pixels a side in evaluation.
    eval_crop: what published evaluations cut: 'squash' or 'centre'.
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
  eval_crop: str
  augment_magnitude: int = 0
  reported_top1: float | None = None
  source: str = ''

  @property
  def preprocessing(self) -> preprocessing.EvalPreprocessing:
    """What published evaluations of the model do to an image."""
    return preprocessing.EvalPreprocessing(self.test_size, self.eval_crop)

  @property
  def options(self) -> Collection[str]:
    """The arguments of the family's module."""
    return inspect.signature(self.family.__init__).parameters


class Model(NamedTuple):
  """A model as pure functions, with its specification.

  Attributes:
    init: `(rng, images, is_training) -> (params, state)`.
    apply: `(params, state, rng, images, is_training, positions=None,
      remat=False) -> (logits, state)`; `rng` may be None in evaluation.
    endpoints: like `apply` without `remat`, returning a dict of intermediate
      statistics, pooled features and logits in place of the logits.
    spec: the model's row of the table.
  """

  init: Callable
  apply: Callable
  endpoints: Callable
  spec: ModelSpec


# ImageNet top-1 by registry name, all from arXiv 2102.06171, and where there.
# F6 was trained with SAM, F0 to F5 without. The baseline and modified-width
# rows are without MixUp, CutMix and RandAugment, the other NFNets with all.
_REPORTED = {
  'table 3': {
    'nfnet_f0': 83.6,
    'nfnet_f1': 84.7,
    'nfnet_f2': 85.1,
    'nfnet_f3': 85.7,
    'nfnet_f4': 85.9,
    'nfnet_f5': 86.0,
    'nfnet_f6': 86.5,
    'resnet50': 78.6,
    'senet50': 79.4,
    'efficientnet_b0': 77.1,
    'efficientnet_b3': 81.6,
    'efficientnet_b4': 82.9,
    'efficientnet_b5': 83.7,
    'efficientnet_b6': 84.0,
    'efficientnet_b7': 84.7,
  },
  'table 2': {
    'nfnet_f0_baseline': 80.4,
    'nfnet_f1_baseline': 81.7,
    'nfnet_f2_baseline': 82.0,
    'nfnet_f3_baseline': 82.3,
    'nfnet_f0_modified_width': 80.9,
    'nfnet_f1_modified_width': 81.8,
    'nfnet_f2_modified_width': 82.0,
    'nfnet_f3_modified_width': 82.3,
    'nfnet_f0_default_width': 83.1,
    'nfnet_f1_default_width': 84.5,
    'nfnet_f2_default_width': 85.0,
    'nfnet_f3_default_width': 85.5,
  },
  'table 6': {
    'nfnet_f0_bn': 83.4,
    'nfnet_f1_bn': 84.4,
    'nfnet_f2_bn': 85.1,
    'nfnet_f3_bn': 85.5,
  },
}
_SOURCES = {
  name: (top1, f'arXiv 2102.06171, {table}')
  for table, rows in _REPORTED.items()
  for name, top1 in rows.items()
}

# Families whose images are evaluated without regard to their aspect ratio.
_SQUASHED = (nfnet.NFNet, bn_nfnet.BNNFNet)
# The NFNets that table 6 trains with batch normalisation, and a small one.
_WITH_BN = ('f0', 'f1', 'f2', 'f3', 'pico')


def _specs(
  family: type[hk.Module],
  variants: Mapping[str, Any],
  name: Callable[[str], str],
) -> list[ModelSpec]:
  """Makes a row of each variant; `name` maps variants to registry names."""
  rows = []
  for variant, row in variants.items():
    top1, source = _SOURCES.get(name(variant), (None, ''))
    rows.append(
      ModelSpec(
        name=name(variant),
        family=family,
        variant=variant,
        train_size=row.train_size,
        test_size=row.test_size,
        eval_crop='squash' if family in _SQUASHED else 'centre',
        augment_magnitude=getattr(row, 'augment_magnitude', 0),
        reported_top1=top1,
        source=source,
      )
    )
  return rows


def _numbered(prefix: str) -> Callable[[str], str]:
  """Names 'resnet50', but 'resnet_pico'."""
  return lambda variant: prefix + '_' * (not variant.isdigit()) + variant


_BN_NFNETS = {variant: nfnet.VARIANTS[variant] for variant in _WITH_BN}
_SPECS = {
  spec.name: spec
  for spec in (
    *_specs(nfnet.NFNet, nfnet.VARIANTS, 'nfnet_{}'.format),
    *_specs(bn_nfnet.BNNFNet, _BN_NFNETS, 'nfnet_{}_bn'.format),
    *_specs(nf_resnet.NFResNet, nf_resnet.VARIANTS, _numbered('nf_resnet')),
    *_specs(nf_regnet.NFRegNet, nf_regnet.VARIANTS, 'nf_regnet_{}'.format),
    *_specs(bn_resnet.BNResNet, bn_resnet.VARIANTS, _numbered('bn_resnet')),
    *_specs(bn_resnet.ResNetV1, bn_resnet.VARIANTS_V1, str),
    *_specs(
      efficientnet.EfficientNet,
      efficientnet.VARIANTS,
      'efficientnet_{}'.format,
    ),
  )
}


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

    def forward(
      images: jax.Array, is_training: bool, positions=None, remat=False
    ):
      return module(images, is_training, positions, remat)

    def endpoints(images: jax.Array, is_training: bool, positions=None):
      return module.endpoints(images, is_training, positions)

    return forward, (forward, endpoints)

  transformed = hk.multi_transform_with_state(make)
  return Model(transformed.init, *transformed.apply, spec)


# Stand-ins, until this file is rewritten.
create_model = create
get_model_spec = get_spec


def register_model(spec: ModelSpec) -> None:
  """Add a model to the table."""
  _SPECS[spec.name] = spec
