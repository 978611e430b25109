"""Identify the model of a tree of parameters by its paths and shapes."""

from __future__ import annotations

import collections
from collections.abc import Mapping
import functools
import inspect
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from nfnet_jax import trees
from nfnet_jax.models import classifier, registry

Tree = Mapping[str, Mapping[str, Any]]

# Number of differences that a message names.
_MAX_NAMED = 3


class MismatchError(ValueError):
  """A tree fits no model, or not the one that it should."""


def abstract_trees(
  name: str, num_classes: int, options: Mapping[str, Any]
) -> tuple[Tree, Tree]:
  """Return shapes and dtypes of a model's parameters and state."""
  model = registry.create(name, num_classes, **options)
  # Parameters do not depend on the size of the image.
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  return jax.eval_shape(
    lambda key, images: model.init(key, images, False),
    jax.random.key(0),
    images,
  )


def constructor_defaults(name: str) -> dict[str, Any]:
  """Return the arguments of a model's constructor with their defaults.

  Examples:
    >>> constructor_defaults('nfnet_f0')['activation']
    'gelu'
  """
  family = registry.get_model_spec(name).family
  parameters = inspect.signature(family.__init__).parameters
  return {name: parameter.default for name, parameter in parameters.items()}


def identify(params: Tree, model_state: Tree) -> tuple[str, int]:
  """Find the model whose parameters a tree holds.

  Args:
    params: `{module path: {name: array}}`, under the published paths.
    model_state: running statistics likewise; empty for normalizer-free models.

  Returns:
    Its registry name, and the number of classes.

  Raises:
    MismatchError: if they fit no model; the message names the first paths and
      shapes that differ from those of the nearest model.

  Examples:
    >>> params, state = abstract_trees('nfnet_pico', 10, {})
    >>> identify(params, state)
    ('nfnet_pico', 10)
  """
  root = _root(params)
  num_classes = count_classes(params)
  nearest = None
  for name in _candidates(root, params):
    expected = abstract_trees(name, num_classes, {})
    wrong = differences((params, model_state), expected)
    if not wrong:
      return name, num_classes
    if nearest is None or len(wrong) < len(nearest[1]):
      nearest = name, wrong
  if nearest is None:
    known = ', '.join(sorted(set(_roots().values())))
    raise MismatchError(
      f"they fit no known model: paths begin with '{root}', not with one of "
      + known
    )
  raise _mismatch(f"they fit no known model; of '{nearest[0]}'", nearest[1])


def count_classes(params: Tree) -> int:
  """Read the number of classes from the shape of the classifier's kernel.

  Raises:
    MismatchError: if there is no classifier.
  """
  path = classifier_path(params)
  shape = np.shape(params.get(path, {}).get('w', ()))
  if len(shape) != 2 or not shape[-1]:
    raise MismatchError(
      f"they fit no known model: there is no classifier '{path}/w' [C, classes]"
    )
  return int(shape[-1])


def classifier_path(params: Tree) -> str:
  """Return the path of the module that maps features to logits."""
  return f'{_root(params)}/~/linear'


def _root(params: Tree) -> str:
  """Return the first part that most paths have."""
  roots = collections.Counter(path.partition('/')[0] for path in params)
  return next((root for root, _ in roots.most_common(1)), '')


def check(
  name: str,
  num_classes: int,
  options: Mapping[str, Any],
  variables: tuple[Tree, Tree],
) -> None:
  """Check that parameters and state are those of a model.

  Raises:
    MismatchError: if they are not; the message names the first paths and shapes
      that differ. Also if the model does not take these options.
    ValueError: if there is no such model.
  """
  registry.get_model_spec(name)
  try:
    expected = abstract_trees(name, num_classes, options)
  except Exception as error:  # Haiku and JAX raise many kinds.
    raise MismatchError(
      f"'{name}' cannot be built with {dict(options)}: {error}"
    ) from error
  wrong = differences(variables, expected)
  if wrong:
    raise _mismatch(f"of '{name}'", wrong)


def differences(
  variables: tuple[Tree, Tree], expected: tuple[Tree, Tree]
) -> list[str]:
  """List the paths at which parameters and state differ from the expected."""
  has = _shapes(variables)
  wants = _shapes(expected)
  return [
    f'{path} is {has.get(path, "missing")}, not {wants.get(path, "expected")}'
    for path in sorted(has.keys() | wants.keys())
    if has.get(path) != wants.get(path)
  ]


def _shapes(variables: tuple[Tree, Tree]) -> dict[str, list[int]]:
  return {
    path: list(np.shape(leaf))
    for tree in variables
    for path, leaf in trees.named_leaves(tree)
  }


def _mismatch(subject: str, wrong: list[str]) -> MismatchError:
  named = '; '.join(wrong[:_MAX_NAMED])
  left = len(wrong) - _MAX_NAMED
  more = f'; and {left} more' if left > 0 else ''
  return MismatchError(f'{subject} they differ in: {named}{more}')


def _candidates(root: str, params: Tree) -> list[str]:
  """List the models of a root whose number of blocks is nearest to the tree's.

  Only models with the same number of blocks can fit. If there are none, the
  error message names the nearest.
  """
  found = len({path.split('/')[2] for path in params if _is_in_block(path)})
  names = [name for name, known in _roots().items() if known == root]
  specs = {name: registry.get_model_spec(name) for name in names}
  distance = {
    name: abs(_count_blocks(spec.family, spec.variant) - found)
    for name, spec in specs.items()
  }
  nearest = min(distance.values(), default=0)
  return [name for name in names if distance[name] == nearest]


def _is_in_block(path: str) -> bool:
  # Such as 'NFNet/~/nf_block_3/~/conv0': only blocks hold modules.
  parts = path.split('/')
  return len(parts) > 4 and 'squeeze_excite' not in parts[2]


def _roots() -> dict[str, str]:
  """Map registry names to the first part of their parameters' paths."""
  return {
    name: constructor_defaults(name)['name'] for name in registry.list_models()
  }


@functools.cache  # Building all NFNets takes seconds.
def _count_blocks(family: Any, variant: str) -> int:
  """Count a model's blocks; builds its modules without parameters."""
  built: list[classifier.ImageClassifier] = []
  hk.transform(lambda: built.append(family(1, variant))).init(None)
  return len(built[0].blocks)
