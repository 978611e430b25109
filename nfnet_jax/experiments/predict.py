"""Says what images show: the five likeliest classes of each, in words.

  python -m nfnet_jax.experiments.predict --weights=F0_haiku.npz a.jpg photos/

Takes images of any format that Pillow reads, and folders of them. Size and crop
are the network's own. `--plot=FILE.png` draws the first images with their
probabilities. `--json` prints one object: `model`, `images` (each `path` and
`top5`, of `class`, `name` and `probability`) and `unreadable` (each `path` and
`reason`). Files that cannot be read are listed at the end, and make the exit
code 1.
"""

import json
import os
import pathlib

from absl import flags

from nfnet_jax import errors
from nfnet_jax.cli import command, common_flags

for _name in ('weights', 'size', 'timm_forward', 'json'):
  flags.declare_key_flag(_name)
_BATCH = flags.DEFINE_integer(
  'batch_size', 32, 'Images at a time.', lower_bound=1
)
_PLOT = flags.DEFINE_string('plot', None, 'Picture to draw, such as out.png.')

_TOP = 5
# Images in a plot; more would be too small to see, or too large to open.
_PLOTTED = 24


def main(*arguments: str) -> int:
  from nfnet_jax.data import files

  with errors.as_input_error():
    paths = files.find_images(arguments)
  plot = _PLOT.value and _check_plot(pathlib.Path(_PLOT.value))
  weights = common_flags.get_weights()
  rows, shown, unreadable = [], [], []
  for prepared, top in _predict(weights, paths):
    if prepared.fault:
      unreadable.append({'path': prepared.path, 'reason': prepared.fault})
      continue
    rows.append({'path': prepared.path, 'top5': top})
    if len(shown) < _PLOTTED:
      shown.append((prepared, top))
    if not common_flags.JSON.value:
      print(_table(rows[-1]), flush=True)
  if common_flags.JSON.value:
    print(
      json.dumps(
        {'model': weights.model, 'images': rows, 'unreadable': unreadable}
      )
    )
  if plot and shown:
    _draw(plot, shown)
    command.log(f'{plot}')
  for row in unreadable:
    command.log(f'nfnet_jax: {row["path"]} cannot be read: {row["reason"]}')
  return command.EXIT_FAILED if unreadable else 0


def _predict(weights, paths):
  """Yields each prepared file with the likeliest classes, or None."""
  from nfnet_jax.data import files
  from nfnet_jax.weights import inference

  size = min(_BATCH.value, len(paths))
  network = inference.Network(weights, size)
  images = files.prepare(paths, weights.preprocessing)
  for batch in inference.in_batches(images, size, len(paths)):
    readable = [prepared.image for prepared in batch if not prepared.fault]
    outputs = iter(network(readable)['probabilities'] if readable else ())
    for prepared in batch:
      top = None if prepared.fault else _top(next(outputs), weights.class_names)
      yield prepared, top


def _top(probabilities, names) -> list[dict]:
  order = (-probabilities).argsort(stable=True)[:_TOP]
  return [
    {
      'class': int(index),
      'name': names[index],
      'probability': float(probabilities[index]),
    }
    for index in order
  ]


def _table(row: dict) -> str:
  lines = [
    f'{100 * guess["probability"]:8.2f} %  {guess["name"]}'
    for guess in row['top5']
  ]
  # A file's name need not be text.
  path = os.fsencode(row['path']).decode(errors='replace')
  return '\n'.join([path, *lines])


def _check_plot(path: pathlib.Path) -> pathlib.Path:
  if path.suffix != '.png' or not path.absolute().parent.is_dir():
    raise errors.InputError(
      f"--plot='{path}' must end in .png and lie in a folder that exists."
    )
  return path


def _draw(path: pathlib.Path, shown: list) -> None:
  from nfnet_jax import plotting

  columns = min(3, len(shown))
  rows = -(-len(shown) // columns)
  figure, axes = plotting.subplots(
    rows,
    2 * columns,
    figsize=(6.4 * columns, 2.4 * rows),
    width_ratios=[2, 3] * columns,
    squeeze=False,
    layout='constrained',
  )
  for axis in axes.flat:
    axis.axis('off')
  for (image, bars), (prepared, top) in zip(
    axes.reshape(-1, 2), shown, strict=False
  ):
    image.imshow(prepared.image.clip(0, 255).astype('uint8'))
    # Names are no formulas, whatever dollars they have.
    style = {'fontsize': 8, 'parse_math': False}
    image.set_title(pathlib.Path(prepared.path).name, **style)
    bars.axis('on')
    names = [guess['name'] for guess in top]
    bars.barh(range(len(top)), [guess['probability'] for guess in top])
    bars.set_yticks(range(len(top)), names, **style)
    bars.set_xlim(0, 1)
    bars.invert_yaxis()
  plotting.save(figure, path, dpi=100)


if __name__ == '__main__':
  command.run(main, takes='IMAGE...')
