"""Plot how a network's signal grows from block to block.

  python -m nfnet_jax.experiments.signal_propagation --model=nf_resnet50

writes nf_resnet50.csv and nf_resnet50.png to `--out`. For every block they have
the average squared mean and the average variance of its output channels, the
variance of its residual branch, and, where it is known, the variance that
analysis expects (Brock et al., arXiv 2101.08692). Images are Gaussian noise, or
those of `--dataset`. The network is that of `--weights`, or has initial weights
with skip gains of 1: the published 0 would hide the branches.

Zero padding lowers variances: use 224 pixels or more. The averaging shortcuts
of NFNets and NF-RegNets quarter the variance of noise at each transition: use
images for them.
"""

from __future__ import annotations

from collections.abc import Sequence
import csv
import pathlib
from typing import Any, TYPE_CHECKING

from absl import flags

from nfnet_jax import errors, preprocessing
from nfnet_jax.cli import command, common_flags
from nfnet_jax.storage import failures

if TYPE_CHECKING:
  import jax

  from nfnet_jax.models import registry

for _name in (
  'weights',
  'timm_forward',
  'size',
  'out',
  'dataset',
  'split',
  'data_dir',
):
  flags.declare_key_flag(_name)
_MODEL = flags.DEFINE_string('model', None, 'Name of a model.')
_BATCH = flags.DEFINE_integer('batch', 8, 'Number of images.', lower_bound=1)

COLUMNS = ('block', 'sq_mean', 'var', 'residual_var', 'expected_var')
_TITLES = {
  'sq_mean': 'average squared channel mean',
  'var': 'average channel variance',
  'residual_var': 'variance of the residual branch',
}


def main() -> None:
  """Write the table and the picture of a network to `--out`."""
  from nfnet_jax.storage import files

  out = common_flags.get_out()
  name, model, params, state = _get_network()
  size = common_flags.SIZE.value or model.spec.test_size
  rows = measure(model, params, state, _get_images(size))
  table, picture = out / f'{name}.csv', out / f'{name}.png'
  with files.atomically(table) as temporary, temporary.open('w') as file:
    writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
  _plot(name, rows, picture)
  print(table, picture, sep='\n')


def _get_network() -> tuple[str, registry.Model, Any, Any]:
  """Return name, model, parameters and state, trained or initial ones."""
  from nfnet_jax.models import registry

  if common_flags.WEIGHTS.value:
    weights = common_flags.get_weights().with_options(stochdepth_rate=0.0)
    return weights.model, weights.create(), weights.params, weights.model_state
  if not _MODEL.value:
    raise errors.InputError('Name a model: --model=NAME or --weights=PATH.')
  with errors.as_input_error():
    model = registry.create(_MODEL.value, stochdepth_rate=0.0)
  return model.spec.name, model, *initialize(model)


def initialize(model: registry.Model, seed: int = 0) -> tuple[Any, Any]:
  """Return initial parameters, with all gains 1, and initial state.

  At 0, where some gains start, branches would have no signal.
  """
  import jax
  import jax.numpy as jnp

  from nfnet_jax import trees

  images = jnp.zeros((1, 32, 32, 3))  # Shapes do not depend on the image's.
  params, state = jax.jit(lambda key: model.init(key, images, False))(
    jax.random.key(seed)
  )
  is_gain = lambda path: path.endswith('gain')
  return (
    trees.map_named(
      lambda path, p: jnp.ones_like(p) if is_gain(path) else p, params
    ),
    state,
  )


def measure(
  model: registry.Model, params: Any, state: Any, images: jax.Array
) -> list[dict[str, Any]]:
  """Return a row of `COLUMNS` for every block, from input to output.

  Batch normalisation takes the statistics of these images.
  """
  import jax

  key = jax.random.key(1)
  run = jax.jit(
    lambda p, s, i: model.endpoints(p, s, key, i, bool(jax.tree.leaves(s)))[0]
  )
  outputs = jax.device_get(run(params, state, images))
  count = sum(name.startswith('block_') for name in outputs)
  expected: Sequence[float | None] | None
  expected = model.spec.expected_variance
  rows = []
  for index, variance in enumerate(expected or [None] * count):
    statistics = outputs[f'block_{index}']
    row = {name: float(value) for name, value in statistics.items()}
    rows.append({'block': index, **row, 'expected_var': variance})
  return rows


def _get_images(size: int) -> jax.Array:
  import jax

  dataset = common_flags.DATASET.value
  if not dataset:
    return jax.random.normal(jax.random.key(2), (_BATCH.value, size, size, 3))
  from nfnet_jax.data import pipeline, sources
  from nfnet_jax.models import inputs

  with failures.as_command_error(), errors.as_input_error():
    source = sources.load(dataset, common_flags.DATA_DIR.value)
    batches = pipeline.eval_batches(
      source,
      common_flags.SPLIT.value,
      batch_size=_BATCH.value,
      preprocessing=preprocessing.EvalPreprocessing(size, margin=0),
    )
    batch = next(batches, None)
    if batch is None:
      raise errors.InputError(
        f"'{common_flags.SPLIT.value}' of '{dataset}' has no images. Use "
        'another --split.'
      )
  pixels = batch['image'][batch['mask'] > 0]
  return inputs.normalize_images(jax.numpy.asarray(pixels))


def _plot(
  name: str, rows: Sequence[dict[str, Any]], path: pathlib.Path
) -> None:
  from nfnet_jax import plotting

  blocks = [row['block'] for row in rows]
  figure, axes = plotting.subplots(
    1, len(_TITLES), figsize=(12, 3.5), layout='constrained'
  )
  for axis, (column, title) in zip(axes, _TITLES.items()):
    axis.plot(blocks, [row[column] for row in rows], 'o-', ms=3, label=name)
    axis.set(title=title, xlabel='block')
    axis.xaxis.get_major_locator().set_params(integer=True)
  if rows[0]['expected_var'] is not None:
    expected = [row['expected_var'] for row in rows]
    axes[1].plot(blocks, expected, 'k--', lw=1, label='expected')
  axes[1].legend()
  plotting.save(figure, path, dpi=120)


if __name__ == '__main__':
  command.run(main)
