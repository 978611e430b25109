"""Plots how a network's signal grows from block to block.

  python -m nfnet_jax.experiments.signal_propagation --model=nf_resnet50

writes nf_resnet50.csv and nf_resnet50.png to `--out`: after every block the
average squared mean and the average variance of its channels, and the variance
of its residual branch; with the variance that analysis expects, where there is
one (Brock et al., arXiv 2101.08692). Images are Gaussian noise, or those of
`--dataset`. The network is that of `--weights`, or has initial weights with
skip gains of 1: the published 0 would hide the branches.

Zero padding lowers variances: use 224 pixels or more. The averaging shortcuts
of NFNets and NF-RegNets quarter the variance of noise at each transition: show
them images.
"""

import csv
import pathlib

from absl import flags

from nfnet_jax import errors, preprocessing
from nfnet_jax.cli import command, common_flags

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
_BATCH = flags.DEFINE_integer('batch', 8, 'Images.', lower_bound=1)

COLUMNS = ('block', 'sq_mean', 'var', 'residual_var', 'expected_var')


def main() -> None:
  from nfnet_jax.storage import files

  out = common_flags.get_out()
  name, model, params, state = _network()
  size = common_flags.SIZE.value or model.spec.test_size
  rows = measure(model, params, state, _images(size))
  table, picture = out / f'{name}.csv', out / f'{name}.png'
  with files.atomically(table) as temporary, temporary.open('w') as file:
    writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
  _plot(name, rows, picture)
  print(table, picture, sep='\n')


def _network():
  """Returns name, model, parameters and state: trained, or fresh ones."""
  from nfnet_jax.models import registry

  if common_flags.WEIGHTS.value:
    weights = common_flags.get_weights().with_options(stochdepth_rate=0.0)
    return weights.model, weights.create(), weights.params, weights.model_state
  if not _MODEL.value:
    raise errors.InputError('Say which: --model=NAME or --weights=PATH.')
  with errors.as_input_error():
    model = registry.create(_MODEL.value, stochdepth_rate=0.0)
  return model.spec.name, model, *initial(model)


def initial(model):
  """Returns initial parameters, with skip gains of 1, and state."""
  import jax
  import jax.numpy as jnp

  from nfnet_jax import trees

  images = jnp.zeros((1, 32, 32, 3))  # Sizes do not depend on the image's.
  params, state = jax.jit(lambda key: model.init(key, images, False))(
    jax.random.key(0)
  )
  is_skip = lambda path: path.endswith('skip_gain')
  return (
    trees.map_named(
      lambda path, p: jnp.ones_like(p) if is_skip(path) else p, params
    ),
    state,
  )


def measure(model, params, state, images) -> list[dict[str, float]]:
  """Returns a row of `COLUMNS` for every block, from input to output.

  Batch normalisation takes the statistics of these images.
  """
  import jax

  key = jax.random.key(1)
  run = jax.jit(
    lambda p, s, i: model.endpoints(p, s, key, i, bool(jax.tree.leaves(s)))[0]
  )
  outputs = jax.device_get(run(params, state, images))
  blocks = [
    outputs[f'block_{index}']
    for index in range(sum(name.startswith('block_') for name in outputs))
  ]
  expected = model.spec.expected_variance or [None] * len(blocks)
  return [
    {
      'block': index,
      **{name: float(value) for name, value in block.items()},
      'expected_var': variance,
    }
    for index, (block, variance) in enumerate(zip(blocks, expected))
  ]


def _images(size: int):
  import jax

  if not common_flags.DATASET.value:
    return jax.random.normal(jax.random.key(2), (_BATCH.value, size, size, 3))
  from nfnet_jax.data import pipeline, sources
  from nfnet_jax.models import inputs

  with errors.as_input_error():
    source = sources.load(
      common_flags.DATASET.value, common_flags.DATA_DIR.value
    )
    batches = pipeline.eval_batches(
      source,
      common_flags.SPLIT.value,
      batch_size=_BATCH.value,
      preprocessing=preprocessing.EvalPreprocessing(size, margin=0),
    )
    return inputs.normalize_images(next(batches)['image'])


def _plot(name: str, rows: list[dict], path: pathlib.Path) -> None:
  from nfnet_jax import plotting

  blocks = [row['block'] for row in rows]
  figure, axes = plotting.subplots(
    1, 3, figsize=(12, 3.5), layout='constrained'
  )
  for axis, column, title in zip(
    axes,
    ('sq_mean', 'var', 'residual_var'),
    (
      'average squared channel mean',
      'average channel variance',
      'variance of the residual branch',
    ),
  ):
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
