"""Writes a trained network's pooled features of images to an .npz.

  python -m nfnet_jax.experiments.features --weights=F0_haiku.npz \\
    --to=features.npz a.jpg photos/

writes `features [N, channels]` float32, taken before dropout and classifier,
and `paths [N]`. With `--dataset=NAME` in place of images, those of its
`--split`, in its order, with `labels [N]`. Size and crop are the network's own.
Files that cannot be read are left out and listed at the end, and make the exit
code 1.
"""

from collections.abc import Sequence
import contextlib

from absl import flags

from nfnet_jax import errors
from nfnet_jax.cli import command, common_flags
from nfnet_jax.storage import failures

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
  import numpy as np

  from nfnet_jax.storage import files

  if bool(arguments) == bool(common_flags.DATASET.value):
    raise errors.InputError('Name images, or a --dataset; not both.')
  to = common_flags.get_to()
  if not to.endswith('.npz'):
    raise errors.InputError(f"--to='{to}' must end in .npz.")
  arrays, faults = _of_files(arguments) if arguments else (_of_dataset(), [])
  with (
    errors.as_input_error(OSError),
    files.atomically(to) as temporary,
    temporary.open('wb') as file,
  ):
    np.savez(file, **arrays)
  count, channels = np.shape(arrays['features'])
  command.log(f'{to}: {count:,} images of {channels:,} features')
  for path, fault in faults:
    command.log(f'nfnet_jax: {path} cannot be read: {fault}')
  return command.EXIT_FAILED if faults else 0


def _of_files(arguments: Sequence[str]):
  """Returns the arrays of files, and (path, reason) of those not read."""
  from nfnet_jax.data import files
  from nfnet_jax.weights import inference

  with errors.as_input_error():
    paths = files.find_images(arguments)
  weights = common_flags.get_weights()
  network = inference.Network(weights, min(_BATCH, len(paths)))
  prepared = files.prepare(paths, weights.preprocessing)
  features, kept, faults = [], [], []
  for batch in inference.in_batches(prepared, _BATCH, len(paths)):
    faults += [(item.path, item.fault) for item in batch if item.fault]
    readable = [item for item in batch if not item.fault]
    if readable:
      images = [item.image for item in readable]
      features.append(network(images)['features'])
      kept += [item.path for item in readable]
  if not kept:
    raise errors.InputError(f'No image could be read: {faults[0][1]}.')
  return {'features': _joined(features), 'paths': kept}, faults


def _of_dataset():
  """Returns the arrays of a dataset's split."""
  from nfnet_jax.data import faults, pipeline, sources
  from nfnet_jax.weights import inference

  weights = common_flags.get_weights()
  network = inference.Network(weights, _BATCH)
  features, labels = [], []
  with (
    failures.as_command_error(),
    errors.as_input_error(),
    _as_repairable(faults.BadDataError),
  ):
    source = sources.load(
      common_flags.DATASET.value, common_flags.DATA_DIR.value
    )
    examples = source.num_examples(common_flags.SPLIT.value)
    if not examples:
      raise errors.InputError(
        f"--split='{common_flags.SPLIT.value}' has 0 examples."
      )
    batches = pipeline.eval_batches(
      source,
      common_flags.SPLIT.value,
      batch_size=_BATCH,
      preprocessing=weights.preprocessing,
      note=command.log,
    )
    total = -(-examples // _BATCH)
    for (batch,) in inference.in_batches(batches, 1, total, 'batches'):
      kept = batch['mask'] > 0
      features.append(network(batch['image'])['features'][kept])
      labels.append(batch['label'][kept])
  return {'features': _joined(features), 'labels': _joined(labels)}


@contextlib.contextmanager
def _as_repairable(kind):
  """Leaves out the settings that would pass over bad records elsewhere."""
  try:
    yield
  except kind as error:
    raise errors.InputError(f'{error.what} Repair the dataset.') from error


def _joined(parts):
  import numpy as np

  return np.concatenate(parts)


if __name__ == '__main__':
  command.run(main, takes='[IMAGE...]')
