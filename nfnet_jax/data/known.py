"""What is known of datasets without TensorFlow, which is slow to import."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import shlex
import sys

# A split or a slice of it, by examples or percent.
_PART = re.compile(r'(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?')


@dataclasses.dataclass(frozen=True)
class Known:
  """Sizes of a dataset.

  Attributes:
    num_classes: number of classes.
    splits: number of examples by split.
    embedded: whether this package builds it on first use, without a download.
  """

  num_classes: int
  splits: dict[str, int]
  embedded: bool = False

  def num_examples(self, split: str) -> int | None:
    """Return the size of 'train', 'train[10%:]', 'train+test', ..., or None.

    Examples:
      >>> DATASETS['imagenet2012'].num_examples('train[10000:]+validation')
      1321167
    """
    total = 0
    for part in split.split('+'):
      match = _PART.fullmatch(part)
      if not match or match[1] not in self.splits:
        return None
      size = self.splits[match[1]]
      first, last = (_index(edge, size) for edge in match.groups()[1:])
      total += len(range(size)[first:last])
    return total


def _index(edge: str | None, size: int) -> int | None:
  """Return the index at an edge of a slice, rounded as by TFDS."""
  if edge is None:
    return None
  if edge.endswith('%'):
    return round(int(edge[:-1]) * size / 100)
  return int(edge)


DATASETS = {
  'imagenet2012': Known(1000, {'train': 1_281_167, 'validation': 50_000}),
  'digits': Known(10, {'train': 1_442, 'test': 355}, embedded=True),
}


def missing_folder(name: str, data_dir: str | None) -> str | None:
  """Return the folder where a dataset is certainly not prepared, else None.

  Args:
    name: name of a dataset. The answer is None if it is not in `DATASETS`.
    data_dir: folder of TFDS datasets; None for TFDS's default.
  """
  root = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  path = pathlib.Path(root).expanduser()
  if name not in DATASETS or DATASETS[name].embedded or '://' in root:
    return None
  return None if (path / name).exists() else str(path)


def how_to_prepare(name: str, folder: str) -> str:
  """Return the message for a dataset that is not prepared in a folder."""
  command = [sys.executable, '-m', 'nfnet_jax.experiments.prepare', name]
  return (
    f"Dataset '{name}' is not prepared under {folder}. Name another folder "
    'with --config.run.data_dir, or run: '
    f'{shlex.join([*command, f"--data_dir={folder}"])}'
  )
