"""A small ImageNet: tars in the published format, built by TFDS."""

import io
import pathlib
import tarfile

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

# Images that are CMYK or PNG in the published tar; TFDS repairs them.
CMYK = 'n01739381_1309.JPEG'
PNG = 'n02105855_2933.JPEG'
SYNSETS = ('n01440764', 'n01739381', 'n02105855', 'n15075141')
TRAIN_PER_CLASS = 24
VALIDATION = 37


def photo(seed: int, size=(75, 60), mode: str = 'RGB') -> Image.Image:
  """Return a smooth random image (width, height) with some grain."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (5, 6, 3), np.uint8)
  image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
  grain = rng.normal(0, 8, (size[1], size[0], 3))
  pixels = np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)
  return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = 'JPEG') -> bytes:
  """Encode an image."""
  buffer = io.BytesIO()
  image.save(buffer, kind)
  return buffer.getvalue()


def write_tars(folder: pathlib.Path) -> None:
  """Write the two tars; train is a tar of one tar per class."""
  folder.mkdir(parents=True, exist_ok=True)
  with tarfile.open(folder / 'ILSVRC2012_img_train.tar', 'w') as train:
    for number, synset in enumerate(SYNSETS):
      _add(train, f'{synset}.tar', _class_tar(synset, number))
  rng = np.random.default_rng(1)
  with tarfile.open(folder / 'ILSVRC2012_img_val.tar', 'w') as validation:
    for number in range(VALIDATION):
      size = tuple(int(side) for side in rng.integers(20, 90, 2))
      data = encoded(photo(10_000 + number, size))
      _add(validation, f'ILSVRC2012_val_{number + 1:08d}.JPEG', data)


def build(data_dir: str, tars: pathlib.Path) -> None:
  """Build the dataset from the tars with TFDS."""
  builder = tfds.builder('imagenet2012', data_dir=data_dir)
  config = tfds.download.DownloadConfig(manual_dir=str(tars), num_shards=3)
  builder.download_and_prepare(download_config=config)


def _class_tar(synset: str, number: int) -> bytes:
  rng = np.random.default_rng(number)
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w') as tar:
    for index in range(TRAIN_PER_CLASS - (synset in (CMYK[:9], PNG[:9]))):
      size = tuple(int(side) for side in rng.integers(20, 90, 2))
      mode = 'L' if index == 1 else 'RGB'
      image = photo(1000 * number + index, size, mode)
      _add(tar, f'{synset}_{index}.JPEG', encoded(image))
    if synset == CMYK[:9]:
      _add(tar, CMYK, encoded(photo(7, mode='CMYK')))
    if synset == PNG[:9]:
      _add(tar, PNG, encoded(photo(8), 'PNG'))
  return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
  member = tarfile.TarInfo(name)
  member.size = len(data)
  tar.addfile(member, io.BytesIO(data))
