"""Parameter groups: which parameters are decayed and which are clipped.

Groups are declared once, as predicates on '/'-joined paths. Every parameter
must belong to exactly one.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from nfnet_jax import trees


@dataclasses.dataclass(frozen=True)
class Group:
  """A set of parameters that the optimiser treats alike.

  Attributes:
    name: name in tables and metrics.
    contains: predicate on paths.
    decay: whether weight decay applies.
    clip: whether AGC applies.
  """

  name: str
  contains: trees.PathPredicate = dataclasses.field(repr=False)
  decay: bool
  clip: bool


# Biases and gains, including those of batch normalisation.
_VECTORS = ('b', 'gain', 'skip_gain', 'offset', 'scale')


def _is_vector(path: str) -> bool:
  name = path.rsplit('/', 1)[-1]
  return name in _VECTORS or name.startswith('bias')  # Also FixUp's 'bias1a'.


def _is_classifier_kernel(path: str) -> bool:
  return path.endswith('linear/w') and 'squeeze_excite' not in path


def _is_kernel(path: str) -> bool:
  return path.endswith('/w') and not _is_classifier_kernel(path)


# Section 4.1 and appendix A.1 of arXiv 2102.06171. The classifier's bias
# belongs to the vectors, as the released code clips it.
NFNET_GROUPS = (
  Group('kernels', _is_kernel, decay=True, clip=True),
  Group('classifier kernel', _is_classifier_kernel, decay=True, clip=False),
  Group('gains and biases', _is_vector, decay=False, clip=True),
)


def group_of(path: str, groups: Sequence[Group] = NFNET_GROUPS) -> Group:
  """Return the one group that a parameter belongs to.

  Raises:
    ValueError: if it belongs to none or to several; the message names the
      parameter and these groups.

  Examples:
    >>> group_of('NFNet/~/linear/w').name
    'classifier kernel'
  """
  found = [group for group in groups if group.contains(path)]
  if len(found) != 1:
    names = ', '.join(f"'{group.name}'" for group in found) or 'no group'
    raise ValueError(
      f"Parameter '{path}' lies in {names}. Declare the groups such that it "
      'lies in exactly one.'
    )
  return found[0]


def group_table(params: Any, groups: Sequence[Group] = NFNET_GROUPS) -> str:
  """Format a table of groups: leaves, parameters, weight decay and clipping.

  Args:
    params: tree of arrays or shapes.
    groups: rows of the table.

  Raises:
    ValueError: if a parameter belongs to no group or to several.
  """
  leaves: dict[str, list[int]] = {group.name: [] for group in groups}
  for path, leaf in trees.named_leaves(params):
    leaves[group_of(path, groups).name].append(math.prod(leaf.shape))
  lines = [f'{"group":<20}{"leaves":>8}{"parameters":>14}  decay  clipping']
  for group in groups:
    sizes = leaves[group.name]
    decay, clip = ('yes' if on else 'no' for on in (group.decay, group.clip))
    lines.append(
      f'{group.name:<20}{len(sizes):>8}{sum(sizes):>14,}  {decay:<5}  {clip}'
    )
  return '\n'.join(lines)
