"""Which model a tree of parameters belongs to, told by its paths and shapes."""

import collections
from collections.abc import Mapping
import inspect
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from nfnet_jax import trees
from nfnet_jax.models import registry

Tree = Mapping[str, Mapping[str, Any]]

# How many differences a message names.
_NAMED = 3


class MismatchError(ValueError):
  """A tree fits no model, or not the one that it should."""


def abstract_trees(
  name: str, num_classes: int, options: Mapping[str, Any]
) -> tuple[Tree, Tree]:
  """Returns shapes and dtypes of a model's parameters and state."""
  model = registry.create(name, num_classes, **options)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  return jax.eval_shape(
    lambda key, images: model.init(key, images, False),
    jax.random.key(0),
    images,
  )


def identify(params: Tree, model_state: Tree) -> tuple[str, int]:
  """Finds the model whose parameters a tree holds.

  Args:
    params: `{module path: {name: array}}`, under the published paths.
    model_state: running statistics likewise; empty for normalizer-free models.

  Returns:
    Its registry name, and the number of classes.

  Raises:
    MismatchError: if it fits none; the message has the first paths and shapes
      in which it differs from the nearest.

  Example:
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
    raise MismatchError(
      f"they fit no known model: paths begin with '{root}', not with one of "
      + ', '.join(sorted(set(_roots().values())))
    )
  raise _mismatch(f"they fit no known model; of '{nearest[0]}'", nearest[1])


def count_classes(params: Tree) -> int:
  """Reads the number of classes off the classifier's kernel.

  Raises:
    MismatchError: if there is none.
  """
  path = classifier_path(params)
  kernel = params.get(path, {}).get('w')
  if np.ndim(kernel) != 2 or not np.shape(kernel)[-1]:
    raise MismatchError(
      f"they fit no known model: there is no classifier '{path}/w' [C, classes]"
    )
  return int(np.shape(kernel)[-1])


def classifier_path(params: Tree) -> str:
  """Returns the path of the module that maps features to logits."""
  return f'{_root(params)}/~/linear'


def _root(params: Tree) -> str:
  """Returns what most paths begin with."""
  roots = collections.Counter(path.partition('/')[0] for path in params)
  return max(roots, key=roots.get, default='')


def check(
  name: str,
  num_classes: int,
  options: Mapping[str, Any],
  variables: tuple[Tree, Tree],
) -> None:
  """Checks that parameters and state are those of a model.

  Raises:
    MismatchError: with the first paths and shapes that differ, or if the model
      takes no such options.
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
  """Lists the paths at which parameters and state differ from the expected."""
  has = _shapes(variables)
  wants = _shapes(expected)
  return [
    f'{path} is {has.get(path, "missing")}, not {wants.get(path, "there")}'
    for path in sorted(has.keys() | wants.keys())
    if has.get(path) != wants.get(path)
  ]


def _shapes(variables: tuple[Tree, Tree]) -> dict[str, list[int]]:
  return {
    path: list(np.shape(leaf))
    for tree in variables
    for path, leaf in trees.named_leaves(tree)
  }


def _mismatch(what: str, wrong: list[str]) -> MismatchError:
  named = '; '.join(wrong[:_NAMED])
  more = f'; and {len(wrong) - _NAMED} more' if len(wrong) > _NAMED else ''
  return MismatchError(f'{what} they differ in: {named}{more}')


def _candidates(root: str, params: Tree) -> list[str]:
  """Lists the models of a root, those with as many blocks as the tree first.

  Only they can fit. If there are none, the nearest serve the message.
  """
  found = len({path.split('/')[2] for path in params if _in_a_block(path)})
  names = [name for name, theirs in _roots().items() if theirs == root]
  distance = {name: abs(_blocks(name) - found) for name in names}
  nearest = min(distance.values(), default=0)
  return [name for name in names if distance[name] == nearest]


def _in_a_block(path: str) -> bool:
  # Such as 'NFNet/~/nf_block_3/~/conv0': blocks alone hold modules.
  parts = path.split('/')
  return len(parts) > 4 and 'squeeze_excite' not in parts[2]


def _roots() -> dict[str, str]:
  """Maps registry names to the root of their parameters' paths."""
  return {name: _default_name(name) for name in registry.list_models()}


def _default_name(model: str) -> str:
  family = registry.get_model_spec(model).family
  return inspect.signature(family.__init__).parameters['name'].default


def _blocks(name: str) -> int:
  return len(_module(name).blocks)


def _module(name: str) -> hk.Module:
  """Builds a model's modules, without parameters."""
  spec = registry.get_model_spec(name)
  built = []

  def build():
    built.append(spec.family(1, spec.variant))

  hk.transform(build).init(None)
  return built[0]
