"""Gradient clipping rules by name: AGC and the baselines of its ablation.

Section 4.1 of arXiv 2102.06171 compares them. To add a rule, add a row to
`RULES`: settings, checks and error messages follow from that table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import TypeAlias

import optax

from nfnet_jax import errors
from nfnet_jax.optim import agc as agc_lib
from nfnet_jax.optim import groups as groups_lib

Clipping: TypeAlias = float | optax.Schedule
Groups = Sequence[groups_lib.Group]


@dataclasses.dataclass(frozen=True)
class ClippingRule:
  """A way to bound gradients.

  Attributes:
    description: one line on what is bounded.
    default: bound that is used if none is given.
    make: `(clipping, eps, groups, statistics) ->
      optax.GradientTransformation`; statistics is a key of `STATISTICS`.
  """

  description: str
  default: float
  make: Callable[[Clipping, float, Groups, str], optax.GradientTransformation]


# Kind of statistics -> function from a path and the groups to the name of the
# set that the parameter is counted in.
STATISTICS: dict[str, Callable[[str, Groups], str]] = {
  'group': lambda path, groups: groups_lib.group_of(path, groups).name,
  'layer': lambda path, groups: path.rpartition('/')[0],
}


def _clip_ratio(
  axes: str, clipping: Clipping, eps: float, groups: Groups, statistics: str
) -> optax.GradientTransformation:
  if statistics not in STATISTICS:
    raise ValueError(
      f"Unknown clip_statistics '{statistics}'; known: {', '.join(STATISTICS)}."
    )
  name_of = STATISTICS[statistics]
  return agc_lib.agc(
    clipping,
    eps,
    axes=axes,
    exclude=lambda path: not groups_lib.group_of(path, groups).clip,
    group_fn=lambda path: name_of(path, groups),
  )


def _clip_global_norm(
  clipping: Clipping, eps: float, groups: Groups, statistics: str
) -> optax.GradientTransformation:
  del eps, groups, statistics  # The norm is over the gradients of all groups.
  if callable(clipping):
    raise ValueError(
      "clip_by 'global_norm' takes no schedule. Give `clipping` as a number."
    )
  return optax.clip_by_global_norm(clipping)


RULES = {
  'unit': ClippingRule(
    'AGC: the gradient-to-weight norm ratio of each output unit.',
    0.01,
    functools.partial(_clip_ratio, 'output_last'),
  ),
  'input_unit': ClippingRule(
    'The gradient-to-weight norm ratio of each input unit.',
    0.01,
    functools.partial(_clip_ratio, 'output_first'),
  ),
  'layer': ClippingRule(
    'The gradient-to-weight norm ratio of each parameter as a whole.',
    0.01,
    functools.partial(_clip_ratio, 'layer'),
  ),
  'global_norm': ClippingRule(
    'The norm of all gradients together.', 1.0, _clip_global_norm
  ),
}


def get_rule(name: str) -> ClippingRule:
  """Return a clipping rule by its name.

  Raises:
    ValueError: if the name is unknown; the message lists the known ones.

  Examples:
    >>> get_rule('global_norm').default
    1.0
  """
  if name not in RULES:
    raise ValueError(
      f"Unknown clip_by '{name}'; known: {', '.join(RULES)}."
      f'{errors.did_you_mean(name, RULES)}'
    )
  return RULES[name]
