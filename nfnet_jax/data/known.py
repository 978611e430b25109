"""Sizes of datasets that are known without preparing them."""

from __future__ import annotations

import dataclasses
import re

_PART = re.compile(r'(\w+)(?:\[(-?\d*):(-?\d*)\])?')


@dataclasses.dataclass(frozen=True)
class Known:
  """Sizes of a dataset.

  Attributes:
    num_classes: number of classes.
    splits: number of examples by split.
  """

  num_classes: int
  splits: dict[str, int]

  def num_examples(self, split: str) -> int | None:
    """Return the size of a split such as 'train[10000:]', None if unknown.

    Example:
      >>> DATASETS['imagenet2012'].num_examples('train[10000:]')
      1271167
    """
    match = _PART.fullmatch(split)
    if not match or match[1] not in self.splits:
      return None
    first, last = (int(edge) if edge else None for edge in match.groups()[1:])
    return len(range(self.splits[match[1]])[first:last])


DATASETS = {
  'imagenet2012': Known(1000, {'train': 1_281_167, 'validation': 50_000}),
  'digits': Known(10, {'train': 1_442, 'test': 355}),
}
