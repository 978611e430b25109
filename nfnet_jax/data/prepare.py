"""Preparing datasets with TFDS; ImageNet from the two tars of its makers."""

import contextlib
import os
import shutil
import sys
import tarfile

import tensorflow as tf
import tensorflow_datasets as tfds

from nfnet_jax.data import known, sources

IMAGENET = 'imagenet2012'
_TRAIN_TAR = 'ILSVRC2012_img_train.tar'
_VALIDATION_TAR = 'ILSVRC2012_img_val.tar'
# As TFDS records them.
_TAR_BYTES = {_TRAIN_TAR: 147_897_477_120, _VALIDATION_TAR: 6_744_924_160}


class PrepareError(ValueError):
  """What should be prepared is not there or not whole."""


def prepare(
  name: str,
  *,
  data_dir: str | None = None,
  manual_dir: str | None = None,
  partial: bool = False,
) -> sources.Source:
  """Builds a dataset where TFDS keeps them, unless it is there already.

  Args:
    name: as TFDS knows it.
    data_dir: where TFDS keeps datasets; None for TFDS's own default.
    manual_dir: folder of files that a person must fetch, such as ImageNet's.
    partial: whether a part of ImageNet will do.

  Returns:
    The dataset, checked.

  Raises:
    PrepareError: naming the file that is missing or not whole, or the split
      whose size is wrong.
    sources.MissingDatasetError: if TFDS does not know the dataset.
  """
  builder = sources.get_builder(name, data_dir)
  is_imagenet = builder.name == IMAGENET
  if not builder.info.splits:
    if is_imagenet:
      _check_tars(manual_dir, builder.data_dir_root, partial)
    config = tfds.download.DownloadConfig(
      manual_dir=manual_dir and os.path.abspath(manual_dir)
    )
    # TFDS prints; standard output belongs to the caller's result.
    with contextlib.redirect_stdout(sys.stderr):
      builder.download_and_prepare(download_config=config)
  source = sources.load(name, data_dir)
  for split in source.splits:
    source.check_files(split)
  if is_imagenet and not partial:
    _check_counts(source)
  return source


def _check_tars(manual_dir: str | None, data_dir, partial: bool) -> None:
  if not manual_dir:
    raise PrepareError(
      f'Say where {_TRAIN_TAR} and {_VALIDATION_TAR} are: --manual_dir=DIR. '
      'They are to be had at https://image-net.org/download-images.'
    )
  found = 0
  for tar, whole in _TAR_BYTES.items():
    path = os.path.join(manual_dir, tar)
    if not tf.io.gfile.exists(path):
      if partial:
        continue
      raise PrepareError(
        f"There is no {tar} in '{manual_dir}'; get it at "
        'https://image-net.org/download-images.'
      )
    found += (size := tf.io.gfile.stat(path).length)
    if size != whole and not partial:
      raise PrepareError(
        f"'{path}' has {size:,} bytes and should have {whole:,}: get it again, "
        'or say --partial if a part is what you want.'
      )
  if not found:
    raise PrepareError(f"There is neither of the tars in '{manual_dir}'.")
  if partial:
    _check_first_images(os.path.join(manual_dir, _VALIDATION_TAR))
  _check_space(str(data_dir), found)


def _check_first_images(path: str) -> None:
  """Checks the names in a partial validation tar.

  TFDS gives the n-th of its images by name the n-th label of all, whichever
  images there are.
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
        'should be: TFDS knows the labels of the first images only.'
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
  whole = known.DATASETS[IMAGENET]
  if source.num_classes != whole.num_classes:
    raise PrepareError(
      f'{source.name} has {source.num_classes} classes, not '
      f'{whole.num_classes}.'
    )
  for split, expected in whole.splits.items():
    there = split in source.splits and source.num_examples(split)
    if there != expected:
      raise PrepareError(
        f"The split '{split}' of {source.name} has {there or 0:,} examples and "
        f'should have {expected:,}: prepare it again from whole tars, or say '
        '--partial if a part is what you want.'
      )
