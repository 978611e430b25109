"""Print what images show: the five likeliest classes of each, in words.

  python -m nfnet_jax.experiments.predict --weights=F0 a.jpg photos/

Takes images of any format that Pillow reads, and folders of them. Size and crop
are the network's own. `--plot=FILE.png` draws the first images with their
probabilities. `--json` prints one object: `model`, `images` (each `path` and
`top5`, of `class`, `name` and `probability`) and `unreadable` (each `path` and
`reason`). Files that cannot be read are listed at the end, and make the exit
code 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import json
import os
import pathlib
from typing import Any, TYPE_CHECKING, TypeAlias

from absl import flags

from nfnet_jax import errors
from nfnet_jax.cli import command, common_flags

if TYPE_CHECKING:
  from nfnet_jax import images
  from nfnet_jax.weights import inference, network

for _name in ('weights', 'size', 'timm_forward', 'json'):
  flags.declare_key_flag(_name)
_BATCH = flags.DEFINE_integer(
  'batch_size', 32, 'Images per batch.', lower_bound=1
)
_PLOT = flags.DEFINE_string('plot', None, 'Picture to draw, such as out.png.')

_TOP = 5
# Images in a plot. More would be too small to see, or make too large a file.
_MAX_PLOTTED = 24

# A file, and its likeliest classes: none if it cannot be read.
Answer: TypeAlias = 'tuple[images.Prepared, list[inference.Prediction]]'


def main(*arguments: str) -> int:
  """Print the likeliest classes of images, and draw them to `--plot`."""
  from nfnet_jax import images

  with errors.as_input_error():
    paths = images.find_images(arguments)
  plot = _check_plot(pathlib.Path(_PLOT.value)) if _PLOT.value else None
  weights = common_flags.get_weights()
  rows, unreadable, plotted = _collect(weights, paths)
  if common_flags.JSON.value:
    report = {'model': weights.model, 'images': rows, 'unreadable': unreadable}
    print(json.dumps(report))
  if plot and plotted:
    _draw(plot, plotted)
    command.log(f'{plot}')
  for row in unreadable:
    command.log(f'nfnet_jax: {row["path"]} cannot be read: {row["reason"]}')
  return command.EXIT_FAILED if unreadable else 0


def _collect(
  weights: network.Weights, paths: Sequence[str]
) -> tuple[
  list[dict],
  list[dict],
  list[Answer],
]:
  """Return the rows of the report, and what a plot shows.

  Without `--json` each row is printed at once.
  """
  rows, unreadable = [], []
  plotted: list[Answer] = []
  for prepared, guesses in _predict(weights, paths):
    if prepared.fault:
      unreadable.append({'path': prepared.path, 'reason': prepared.fault})
      continue
    rows.append({'path': prepared.path, 'top5': list(map(_row, guesses))})
    if len(plotted) < _MAX_PLOTTED:
      plotted.append((prepared, guesses))
    if not common_flags.JSON.value:
      print(_format(rows[-1]), flush=True)
  return rows, unreadable, plotted


def _predict(
  weights: network.Weights, paths: Sequence[str]
) -> Iterator[Answer]:
  """Yield each prepared file and its guesses, none if it cannot be read."""
  from nfnet_jax import images
  from nfnet_jax.weights import inference

  size = min(_BATCH.value, len(paths))
  predictor = inference.Predictor(weights)
  prepared = images.prepare(paths, weights.preprocessing)
  for batch in inference.batched_with_progress(prepared, size, len(paths)):
    readable = [item.image for item in batch if item.image is not None]
    rows = iter(predictor(readable, size)['probabilities'] if readable else ())
    for item in batch:
      if item.image is None:
        yield item, []
      else:
        yield item, inference.likeliest(next(rows), weights.class_names, _TOP)


def _row(guess: inference.Prediction) -> dict[str, Any]:
  return {
    'class': guess.label,
    'name': guess.name,
    'probability': guess.probability,
  }


def _format(row: dict[str, Any]) -> str:
  lines = [
    f'{100 * guess["probability"]:8.2f} %  {guess["name"]}'
    for guess in row['top5']
  ]
  # A file's name need not be valid text.
  path = os.fsencode(row['path']).decode(errors='replace')
  return '\n'.join([path, *lines])


def _check_plot(path: pathlib.Path) -> pathlib.Path:
  if path.suffix != '.png' or not path.absolute().parent.is_dir():
    raise errors.InputError(
      f"--plot='{path}' must end in .png and lie in a folder that exists."
    )
  return path


def _draw(
  path: pathlib.Path,
  plotted: Sequence[Answer],
) -> None:
  from nfnet_jax import plotting

  columns = min(3, len(plotted))
  rows = -(-len(plotted) // columns)
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
  for (picture, bars), (prepared, guesses) in zip(
    axes.reshape(-1, 2), plotted, strict=False
  ):
    assert prepared.image is not None
    picture.imshow(prepared.image.clip(0, 255).astype('uint8'))
    # Names may hold dollar signs, which do not begin a formula here.
    style = {'fontsize': 8, 'parse_math': False}
    picture.set_title(pathlib.Path(prepared.path).name, **style)
    bars.axis('on')
    positions = range(len(guesses))
    bars.barh(positions, [guess.probability for guess in guesses])
    bars.set_yticks(positions, [guess.name for guess in guesses], **style)
    bars.set_xlim(0, 1)
    bars.invert_yaxis()
  plotting.save(figure, path, dpi=100)


if __name__ == '__main__':
  command.run(main, takes='IMAGE...')
