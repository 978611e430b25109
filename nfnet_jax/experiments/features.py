r"""Write a trained network's pooled features of images to an .npz file.

  python -m nfnet_jax.experiments.features --weights=F0 \
    --to=features.npz a.jpg photos/

writes `features [N, channels]` float32, taken before dropout and classifier,
and `paths [N]`. With `--dataset=NAME` in place of images, it takes those of
`--split` in their order, and writes `labels [N]` in place of paths. Size and
crop are the network's own. Files that cannot be read are left out and listed at
the end, and make the exit code 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TYPE_CHECKING

from absl import flags

from nfnet_jax import errors
from nfnet_jax import preprocessing as preprocessing_lib
from nfnet_jax.cli import command, common_flags
from nfnet_jax.storage import failures

if TYPE_CHECKING:
  import numpy as np

for _name in (
  'weights',
  'to',
  'size',
  'timm_forward',
  'dataset',
  'split',
  'data_dir',
):
  flags.declare_key_flag(_name)

_BATCH = 32


def main(*arguments: str) -> int:
  """Write the features of image files, or of a dataset's split, to `--to`."""
  dataset = common_flags.DATASET.value
  if bool(arguments) == bool(dataset):
    raise errors.InputError('Name images, or a --dataset; not both.')
  to = common_flags.get_to()
  if not to.endswith('.npz'):
    raise errors.InputError(f"--to='{to}' must end in .npz.")
  unreadable: list[tuple[str, str]] = []
  if dataset:
    arrays = _features_of_dataset(dataset)
  else:
    arrays, unreadable = _features_of_files(arguments)
  _write(to, arrays)
  for path, reason in unreadable:
    command.log(f'nfnet_jax: {path} cannot be read: {reason}')
  return command.EXIT_FAILED if unreadable else 0


def _write(to: str, arrays: dict[str, Any]) -> None:
  import numpy as np

  from nfnet_jax.storage import files

  with (
    errors.as_input_error(OSError),
    files.atomically(to) as temporary,
    temporary.open('wb') as file,
  ):
    np.savez(file, **arrays)
  count, channels = np.shape(arrays['features'])
  command.log(f'{to}: {count:,} images of {channels:,} features')


def _features_of_files(
  arguments: Sequence[str],
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
  """Return the arrays of files, and (path, reason) of those not read."""
  import numpy as np

  from nfnet_jax import images
  from nfnet_jax.weights import inference

  with errors.as_input_error():
    paths = images.find_images(arguments)
  weights = common_flags.get_weights()
  size = min(_BATCH, len(paths))
  predictor = inference.Predictor(weights)
  prepared = images.prepare(paths, weights.preprocessing)
  features, kept, unreadable = [], [], []
  for batch in inference.batched_with_progress(prepared, size, len(paths)):
    unreadable += [(item.path, item.fault) for item in batch if item.fault]
    kept += [item.path for item in batch if not item.fault]
    readable = [item.image for item in batch if item.image is not None]
    if readable:
      features.append(predictor(readable, size)['features'])
  if not kept:
    raise errors.InputError(f'No image could be read: {unreadable[0][1]}.')
  return {'features': np.concatenate(features), 'paths': kept}, unreadable


def _features_of_dataset(dataset: str) -> dict[str, Any]:
  """Return the arrays of a dataset's split."""
  import numpy as np

  from nfnet_jax.weights import inference

  weights = common_flags.get_weights()
  predictor = inference.Predictor(weights)
  features, labels = [], []
  for batch in _read_batches(dataset, weights.preprocessing):
    kept = batch['mask'] > 0
    features.append(predictor(batch['image'], _BATCH)['features'][kept])
    labels.append(batch['label'][kept])
  return {
    'features': np.concatenate(features),
    'labels': np.concatenate(labels),
  }


def _read_batches(
  dataset: str, preprocessing: preprocessing_lib.EvalPreprocessing
) -> Iterator[dict[str, np.ndarray]]:
  """Yield batches of `--split`, and show progress."""
  from nfnet_jax.data import faults, pipeline, sources
  from nfnet_jax.weights import inference

  split = common_flags.SPLIT.value
  with failures.as_command_error(), errors.as_input_error():
    try:
      source = sources.load(dataset, common_flags.DATA_DIR.value)
      examples = source.num_examples(split)
      if not examples:
        raise errors.InputError(f"--split='{split}' has 0 examples.")
      batches = pipeline.eval_batches(
        source,
        split,
        batch_size=_BATCH,
        preprocessing=preprocessing,
        log_fn=command.log,
      )
      total = -(-examples // _BATCH)
      for (batch,) in inference.batched_with_progress(
        batches, 1, total, 'batches'
      ):
        yield batch
    except faults.BadDataError as error:
      # Its own advice names a setting that this command does not have.
      raise errors.InputError(f'{error.what} Repair the dataset.') from error


if __name__ == '__main__':
  command.run(main, takes='[IMAGE...]')
