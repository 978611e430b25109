"""Prepare a dataset for training with its TFDS builder.

  python -m nfnet_jax.experiments.prepare imagenet2012 --manual_dir=DIR

DIR holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from
https://image-net.org/download-images. TFDS downloads most other datasets.
"""

from __future__ import annotations

from absl import flags

from nfnet_jax import errors
from nfnet_jax.cli import command, common_flags
from nfnet_jax.storage import failures

flags.declare_key_flag('data_dir')
_MANUAL_DIR = flags.DEFINE_string(
  'manual_dir', None, 'Folder of manually downloaded files.'
)
_PARTIAL = flags.DEFINE_bool(
  'partial', False, 'Accept a part of ImageNet: tars of any size.'
)


def main(name: str) -> None:
  """Prepare the dataset and print its sizes."""
  from nfnet_jax.data import prepare

  with failures.as_command_error(), errors.as_input_error():
    source = prepare.prepare(
      name,
      data_dir=common_flags.DATA_DIR.value,
      manual_dir=_MANUAL_DIR.value,
      partial=_PARTIAL.value,
    )
  for split in source.splits:
    print(f'{split:<12}{source.num_examples(split):>12,} images')
  print(f'{"classes":<12}{source.num_classes:>12,}')
  root = source.data_dir_root
  folder = name.partition(':')[0]
  print(
    f'To train on it: --config.run.data_dir={root}\n'
    f'To copy it to a bucket: gcloud storage cp -r {root}/{folder} '
    'gs://BUCKET/datasets/\n'
    'To train from there: --config.run.data_dir=gs://BUCKET/datasets'
  )


if __name__ == '__main__':
  command.run(main, takes='DATASET')
