"""Draw the network's inputs: contact sheets of a config's images.

  python -m nfnet_jax.experiments.show_batch --config=f0 --out=DIR

writes DIR/train.png, the first training images with the weights of their
labels, and DIR/eval.png, the first images of the evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
import pathlib

from absl import flags
import numpy as np

from nfnet_jax import preprocessing
from nfnet_jax.cli import command, common_flags, config_flag

for _name in (*config_flag.FLAGS, 'out'):
  flags.declare_key_flag(_name)
_IMAGES = flags.DEFINE_integer(
  'images', 32, 'Images on a sheet.', lower_bound=4
)

# A small shuffle buffer, which fills quickly.
_SHUFFLE_BUFFER = 1024


def main() -> None:
  """Draw a training and an evaluation batch to `--out`."""
  from nfnet_jax.config import base, steps  # Orbax is slow to import.

  config = config_flag.get_config()
  # One batch and one shard, so that both kinds of mixing are shown.
  augmentation = base.read_fields(preprocessing.Augmentation, config.data)
  unit = max(augmentation.examples_per_group, 2)
  size = -(-_IMAGES.value // unit) * unit
  config.batch_size = config.run.eval_batch_size = size
  config.data.shards = 1
  config.run.fast_paths = 'none'  # Images, not blocks of pixels.
  config.data.shuffle_buffer = min(config.data.shuffle_buffer, _SHUFFLE_BUFFER)
  out = common_flags.get_out()
  experiment = steps.open_experiment(config, devices=1)
  names = experiment.source.class_names
  train = next(experiment.train_batches(0, command.log))
  evaluation = next(experiment.eval_batches(command.log))
  kept = evaluation['mask'] > 0
  for name, images, titles in (
    ('train', train['image'], _titles(train, names)),
    (
      'eval',
      evaluation['image'][kept],
      [names[label] for label in evaluation['label'][kept]],
    ),
  ):
    path = out / f'{name}.png'
    _draw(path, images[: _IMAGES.value], titles)
    print(path)


def _titles(batch: Mapping[str, np.ndarray], names: Sequence[str]) -> list[str]:
  """Return titles such as 'tench 0.63 + goldfish 0.37', or 'tench'."""

  def title(labels: np.ndarray, weights: np.ndarray) -> str:
    if max(weights) > 0.995:
      return names[labels[weights.argmax()]]
    return ' + '.join(
      f'{names[label]} {weight:.2f}' for label, weight in zip(labels, weights)
    )

  return [title(*row) for row in zip(batch['label'], batch['weight'])]


def _draw(
  path: pathlib.Path, images: np.ndarray, titles: Sequence[str]
) -> None:
  from nfnet_jax import plotting

  columns = min(8, len(images))
  rows = math.ceil(len(images) / columns)
  figure, axes = plotting.subplots(
    rows, columns, figsize=(2.2 * columns, 2.4 * rows), squeeze=False
  )
  for axis in axes.flat:
    axis.axis('off')
  for axis, image, title in zip(axes.flat, images, titles):
    axis.imshow(image.clip(0, 255).astype('uint8'))
    axis.set_title(title.replace(' + ', '\n'), fontsize=7)
  figure.tight_layout()
  plotting.save(figure, path, dpi=100)


if __name__ == '__main__':
  command.run(main)
