"""Checks of a dataset for likely mistakes, before a run trains on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
import itertools
import os
import time

import tensorflow as tf

from nfnet_jax import errors, images
from nfnet_jax.data import faults, folders, sources

# Names that a line gives before it only counts.
_SHOWN = 3
# Time after which no more images are read.
_SECONDS = 10
# Images that are read between two looks at the clock.
_CHUNK = 256


def warnings(
  source: sources.Source, train: str, evaluation: str, max_bad_records: int
) -> Iterator[str]:
  """Yield lines about data that looks like a mistake.

  The images of a folder are read, as far as this is quick.

  Args:
    source: the dataset.
    train: split to train on.
    evaluation: split to evaluate on.
    max_bad_records: number of images that may be unreadable.

  Raises:
    faults.BadDataError: naming the first unreadable images, if there are more.
  """
  if count := sources.count_common(source, train, evaluation):
    yield f"'{train}' and '{evaluation}' have {count:,} images in common."
  if isinstance(source, folders.FolderSource):
    yield from folder_warnings(source, train, evaluation)
    yield from check_images(source, (train, evaluation), max_bad_records)


def folder_warnings(
  source: folders.FolderSource, train: str, evaluation: str
) -> Iterator[str]:
  """Yield lines about files, classes and splits that look like mistakes."""
  listing, names = source.listing, source.class_names
  if listing.left_out:
    count = sum(map(len, listing.left_out.values()))
    kinds = ', '.join(
      f'{len(paths)} {kind}' for kind, paths in listing.left_out.items()
    )
    first = itertools.chain.from_iterable(listing.left_out.values())
    yield f'{count} files are left out ({kinds}): {_some(list(first))}.'
  if listing.empty:
    yield f'These folders are empty: {_some(listing.empty)}.'
  if len(names) == 1:
    yield f"There is only one class, '{names[0]}'."
  trained, evaluated = (
    {names[label] for label, _ in source.images(split)}
    for split in (train, evaluation)
  )
  for classes, other in (
    (evaluated - trained, train),
    (trained - evaluated, evaluation),
  ):
    if classes:
      yield f"'{other}' has no images of {_some(sorted(classes))}."
  for used in (train, evaluation):
    parts = [part.partition('[')[0] for part in used.split('+')]
    for part, split in itertools.product(parts, source.splits):
      if split not in parts and _is_like(split, part):
        yield f"The folder has splits '{part}', which is used, and '{split}'."


def _is_like(name: str, other: str) -> bool:
  """Return whether one name begins like the other, as 'val' and 'Validation'.

  Examples:
    >>> _is_like('val', 'Validation'), _is_like('train', 'test')
    (True, False)
  """
  short, long = sorted(
    (''.join(filter(str.isalpha, text.lower())) for text in (name, other)),
    key=len,
  )
  return bool(short) and long.startswith(short)


def check_images(
  source: folders.FolderSource,
  splits: Iterable[str],
  max_count: int,
  seconds: float = _SECONDS,
) -> Iterator[str]:
  """Decode the images of some splits, in the order of a random sample.

  Args:
    source: the folder.
    splits: their images are decoded.
    max_count: number of images that may be unreadable.
    seconds: time after which the rest is not decoded.

  Yields:
    A line about the unreadable images, and one if not all were decoded.

  Raises:
    faults.BadDataError: naming the first unreadable images, if there are more
      than `max_count`.
  """
  paths = list(
    dict.fromkeys(path for split in splits for _, path in source.images(split))
  )
  bad: dict[str, str] = {}
  deadline, checked = time.monotonic() + seconds, 0
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    while checked < len(paths) and time.monotonic() < deadline:
      chunk = paths[checked : checked + _CHUNK]
      found = pool.map(_find_fault, chunk)
      bad |= {path: fault for path, fault in zip(chunk, found) if fault}
      checked += len(chunk)
  if bad:
    shown = _some([f'{path} ({fault})' for path, fault in bad.items()])
    line = f'{len(bad):,} of {checked:,} images cannot be read: {shown}'
    if len(bad) > max_count:
      raise faults.BadDataError(
        f"dataset '{source.name}': {line}.",
        ' Repair or remove them, or skip them with '
        f'--config.run.max_bad_records={len(bad)}.',
      )
    yield f'{line}. They are skipped.'
  if checked < len(paths):
    yield (
      f'{checked:,} of {len(paths):,} images were read to find bad ones, in '
      f'{seconds:g} s.'
    )


def _find_fault(path: str) -> str:
  """Return why an image cannot be read; '' if it may be readable later."""
  try:
    with tf.io.gfile.GFile(path, 'rb') as file:
      return images.find_fault(file.read())
  except faults.PERMANENT as error:
    return errors.first_line(error)
  except tf.errors.OpError:
    return ''


def _some(names: Sequence[str]) -> str:
  """Return the first names, and how many more there are.

  Examples:
    >>> _some(list('abcde'))
    'a, b, c and 2 more'
  """
  more = len(names) - _SHOWN
  return ', '.join(names[:_SHOWN]) + (f' and {more} more' if more > 0 else '')
