"""Names of the leaves of a tree as '/'-joined strings."""

from collections.abc import Callable
from typing import Any

import jax

PathPredicate = Callable[[str], bool]


def path_string(key_path: tuple[Any, ...]) -> str:
  """Joins a JAX key path with '/'.

  Example:
    >>> tree = {'NFNet/~/linear': {'w': 1.0}}
    >>> [path_string(path) for path, _ in jax.tree.leaves_with_path(tree)]
    ['NFNet/~/linear/w']
  """
  return jax.tree_util.keystr(key_path, simple=True, separator='/')


def named_leaves(tree) -> list[tuple[str, Any]]:
  """Lists `(path, leaf)` of a tree, in JAX's order."""
  return [
    (path_string(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)
  ]


def map_named(function: Callable, tree, *rest, is_leaf=None):
  """Maps `function(path, leaf, *leaves)` over trees of the same structure."""
  return jax.tree.map_with_path(
    lambda path, *leaves: function(path_string(path), *leaves),
    tree,
    *rest,
    is_leaf=is_leaf,
  )
