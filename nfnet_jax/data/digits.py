"""The UCI handwritten digits as a TFDS dataset that needs no download."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

_TEST_EVERY = 5


class Digits(tfds.core.GeneratorBasedBuilder):
  """1,797 images of handwritten digits, 8x8 grey, from scikit-learn.

  The split is fixed and stratified: every fifth image of each class, in the
  order of the source, is held out for `test`.
  """

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Every fifth image of each class is in test.'}

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(8, 8, 1)),
          'label': tfds.features.ClassLabel(num_classes=10),
        }
      ),
      supervised_keys=('image', 'label'),
      homepage='https://archive.ics.uci.edu/dataset/80',
      citation=(
        'E. Alpaydin and C. Kaynak. Optical Recognition of Handwritten '
        'Digits. UCI Machine Learning Repository, 1998. doi:10.24432/C50P49'
      ),
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    del dl_manager
    return {
      'train': self._generate_examples(test=False),
      'test': self._generate_examples(test=True),
    }

  def _generate_examples(
    self, test: bool
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    from sklearn import datasets  # Slow to import; needed only to build.

    digits = datasets.load_digits()
    # Pixels of the source are 0 to 16.
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    seen = np.zeros(10, int)
    for index, (image, label) in enumerate(zip(images, digits.target)):
      seen[label] += 1
      if (seen[label] % _TEST_EVERY == 0) == test:
        yield index, {'image': image[..., None], 'label': int(label)}
