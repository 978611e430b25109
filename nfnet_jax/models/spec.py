"""Specifications of models, which are known before a model is created."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from typing import Any, NamedTuple

from nfnet_jax import preprocessing
from nfnet_jax.models import classifier, fast


class Option(NamedTuple):
  """An option of a model: a keyword-only argument of its family.

  Attributes:
    type: bool, int, float or str; an option whose default is None also takes
      None.
    default: its value if it is not set.
    description: one sentence for users.
  """

  type: Callable[[Any], Any]
  default: bool | int | float | str | None
  description: str


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """A model's row of the table: its family, sizes, options and accuracy.

  Attributes:
    name: registry name, such as 'nfnet_f0'.
    family: subclass of `ImageClassifier`.
    variant: its variant.
    train_size: native image size in training, pixels a side.
    test_size: native image size in evaluation, pixels a side.
    eval_crop: crop of published evaluations, 'squash' or 'centre'.
    augment_magnitude: RandAugment magnitude of the published recipe; 0 for no
      RandAugment.
    reported_top1: ImageNet top-1 in percent as its authors report it, or None.
    source: where `reported_top1` is reported.
  """

  name: str
  family: type[classifier.ImageClassifier]
  variant: str
  train_size: int
  test_size: int
  eval_crop: str
  augment_magnitude: int = 0
  reported_top1: float | None = None
  source: str = ''

  @property
  def preprocessing(self) -> preprocessing.EvalPreprocessing:
    """The preprocessing of published evaluations of the model."""
    return preprocessing.EvalPreprocessing(
      size=self.test_size,
      crop=self.eval_crop,
      margin=self.family.eval_margin,
    )

  @property
  def uses_batch_statistics(self) -> bool:
    """Whether the model normalises batches in training."""
    return self.family.uses_batch_statistics

  @property
  def root(self) -> str:
    """The first part of all parameter paths."""
    return inspect.signature(self.family.__init__).parameters['name'].default

  @property
  def options(self) -> dict[str, Option]:
    """The model's options by name, without its fast paths.

    Examples:
      >>> from nfnet_jax.models import registry
      >>> spec = registry.get_model_spec('bn_resnet50')
      >>> spec.options['cross_replica_bn'].default
      False
    """
    constructor = self.family.__init__
    hints = typing.get_type_hints(constructor)
    descriptions = _describe_arguments(constructor.__doc__)
    return {
      name: Option(
        _strip_none(hints[name]), default, descriptions.get(name, '')
      )
      for name, default in self._keywords().items()
      if name != 'name' and name not in fast.PATHS
    }

  @property
  def fast_paths(self) -> frozenset[str]:
    """The fast paths that the model supports; see `models.fast`."""
    return frozenset(fast.PATHS) & self._keywords().keys()

  @property
  def expected_variance(self) -> list[float] | None:
    """The variance after each block at initialisation, if known.

    Examples:
      >>> from nfnet_jax.models import registry
      >>> spec = registry.get_model_spec('nf_resnet50')
      >>> [round(variance, 2) for variance in spec.expected_variance[:4]]
      [1.04, 1.08, 1.12, 1.04]
    """
    return self.family.expected_variance(self.variant)

  def _keywords(self) -> dict[str, Any]:
    parameters = inspect.signature(self.family.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _strip_none(hint: Any) -> Callable[[Any], Any]:
  """Return X of `X | None`, and other types unchanged."""
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    (hint,) = set(typing.get_args(hint)) - {type(None)}
  return hint


def _describe_arguments(docstring: str | None) -> dict[str, str]:
  """Return the first sentence about each argument of a Google docstring."""
  _, _, section = inspect.cleandoc(docstring or '').partition('\nArgs:\n')
  section = textwrap.dedent(re.split(r'^\S', section, flags=re.MULTILINE)[0])
  entries = re.findall(r'^(\w+): (.*(?:\n .*)*)', section, re.MULTILINE)
  return {
    name: re.split(r'(?<=\.) ', ' '.join(text.split()))[0]
    for name, text in entries
  }
