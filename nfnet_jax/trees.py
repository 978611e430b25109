"""Names of the leaves of a tree as '/'-joined strings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

PathPredicate = Callable[[str], bool]


def path_string(key_path: tuple[Any, ...]) -> str:
  """Join a JAX key path with '/'.

  Flax keeps a parameter in a box with the attribute `value`, but not always: an
  NNX optimiser creates its state with boxes and updates it without them. So
  this attribute of an entry of a dictionary is left out.

  Examples:
    >>> tree = {'NFNet/~/linear': {'w': 1.0}}
    >>> [path_string(path) for path, _ in jax.tree.leaves_with_path(tree)]
    ['NFNet/~/linear/w']
  """
  match key_path:
    case (*_, jax.tree_util.DictKey(), jax.tree_util.GetAttrKey(name='value')):
      key_path = key_path[:-1]
  return jax.tree_util.keystr(key_path, simple=True, separator='/')


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
  """List the `(path, leaf)` pairs of a tree, in JAX's order."""
  return [
    (path_string(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)
  ]


def map_named(
  function: Callable[..., Any],
  tree: Any,
  *rest: Any,
  is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
  """Map `function(path, leaf, *leaves)` over trees of the same structure."""
  return jax.tree.map_with_path(
    lambda path, *leaves: function(path_string(path), *leaves),
    tree,
    *rest,
    is_leaf=is_leaf,
  )
