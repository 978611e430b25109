"""Prepare datasets with TFDS; ImageNet from its two published tars."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tarfile

import tensorflow as tf
import tensorflow_datasets as tfds

from nfnet_jax import errors
from nfnet_jax.data import known, sources

IMAGENET = 'imagenet2012'
_TRAIN_TAR = 'ILSVRC2012_img_train.tar'
_VALIDATION_TAR = 'ILSVRC2012_img_val.tar'
# Sizes that TFDS records.
_TAR_BYTES = {_TRAIN_TAR: 147_897_477_120, _VALIDATION_TAR: 6_744_924_160}


class PrepareError(ValueError):
  """A file or the prepared dataset is missing or incomplete."""


def prepare(
  name: str,
  *,
  data_dir: str | None = None,
  manual_dir: str | None = None,
  partial: bool = False,
) -> sources.TFDSSource:
  """Build a TFDS dataset, unless it is built already, and check it.

  Args:
    name: TFDS name.
    data_dir: folder of TFDS datasets; None for TFDS's default.
    manual_dir: folder of manually downloaded files, such as ImageNet's.
    partial: whether to accept a part of ImageNet.

  Returns:
    The dataset.

  Raises:
    PrepareError: naming the file that is missing or incomplete, or the split
      whose size is wrong.
    sources.MissingDatasetError: if TFDS does not know the dataset.
    errors.RunError: if it cannot be downloaded or written now.
  """
  builder = sources.get_builder(name, data_dir)
  is_imagenet = builder.name == IMAGENET
  if not builder.info.splits:
    if is_imagenet:
      _check_tars(manual_dir, builder.data_dir_root, partial)
    config = tfds.download.DownloadConfig(
      manual_dir=manual_dir and os.path.abspath(manual_dir)
    )
    # TFDS prints, but standard output is for the caller's results.
    with contextlib.redirect_stdout(sys.stderr):
      try:
        builder.download_and_prepare(download_config=config)
      except (OSError, tfds.download.DownloadError) as error:
        raise errors.RunError(
          f"'{name}' could not be downloaded or written: "
          f'{errors.one_line(error)}. Check the connection and the disk, then '
          'run the same command again.'
        ) from error
  source = sources.load(name, data_dir)
  assert isinstance(source, sources.TFDSSource)  # A folder has no builder.
  for split in source.splits:
    source.check_files(split)
  if is_imagenet and not partial:
    _check_counts(source)
  return source


def _check_tars(
  manual_dir: str | None, data_dir: str | os.PathLike, partial: bool
) -> None:
  if not manual_dir:
    raise PrepareError(
      f'The folder of {_TRAIN_TAR} and {_VALIDATION_TAR} is not given. '
      'Download them at https://image-net.org/download-images and pass '
      '--manual_dir=DIR.'
    )
  found = 0
  for tar, expected in _TAR_BYTES.items():
    path = os.path.join(manual_dir, tar)
    if not tf.io.gfile.exists(path):
      if partial:
        continue
      raise PrepareError(
        f"There is no {tar} in '{manual_dir}'. Download it at "
        'https://image-net.org/download-images.'
      )
    found += (size := tf.io.gfile.stat(path).length)
    if size != expected and not partial:
      raise PrepareError(
        f"'{path}' has {size:,} bytes and should have {expected:,}. Download "
        'it again, or pass --partial to prepare a part of ImageNet.'
      )
  if not found:
    raise PrepareError(f"There is neither of the tars in '{manual_dir}'.")
  if partial:
    _check_first_images(os.path.join(manual_dir, _VALIDATION_TAR))
  _check_space(str(data_dir), found)


def _check_first_images(path: str) -> None:
  """Check that a partial validation tar holds the first images.

  TFDS sorts its images by name and gives the n-th one the n-th label.
  """
  if not tf.io.gfile.exists(path):
    return
  with (
    tf.io.gfile.GFile(path, 'rb') as file,
    tarfile.open(mode='r:', fileobj=file) as tar,
  ):
    names = sorted(tar.getnames())
  for number, name in enumerate(names, start=1):
    if name != f'ILSVRC2012_val_{number:08d}.JPEG':
      raise PrepareError(
        f"'{path}' holds '{name}' where ILSVRC2012_val_{number:08d}.JPEG "
        'should be. A part must hold the first images: TFDS assigns labels by '
        'order.'
      )


def _check_space(data_dir: str, needed: int) -> None:
  if '://' in data_dir:
    return
  existing = os.path.abspath(data_dir)
  while not os.path.isdir(existing):
    existing = os.path.dirname(existing)
  free = shutil.disk_usage(existing).free
  if free < needed:
    raise PrepareError(
      f"'{data_dir}' has {free / 1e9:.1f} GB free; the dataset needs about "
      f'{needed / 1e9:.1f} GB. Name another folder with --data_dir.'
    )


def _check_counts(source: sources.Source) -> None:
  complete = known.DATASETS[IMAGENET]
  if source.num_classes != complete.num_classes:
    raise PrepareError(
      f'{source.name} has {source.num_classes} classes, not '
      f'{complete.num_classes}.'
    )
  for split, expected in complete.splits.items():
    count = source.num_examples(split) if split in source.splits else 0
    if count != expected:
      raise PrepareError(
        f"The split '{split}' of {source.name} has {count:,} examples and "
        f'should have {expected:,}. Prepare it again from complete tars, or '
        'pass --partial to accept a part of ImageNet.'
      )
