"""Time the loss and gradient of a network with and without fast paths on a CPU.

Writes cpu.csv next to this file and its table into README.md. Takes ten
minutes on two cores:

  JAX_PLATFORMS=cpu python experiments/fast_step/cpu.py
"""

import argparse
from collections.abc import Callable
import csv
import pathlib
import re
import statistics
import time

import jax
import jax.numpy as jnp

import nfnet_jax

HERE = pathlib.Path(__file__).parent
FUSED, CONVS = {'fused_blocks': True}, {'fast_convs': True}
FORMS = {
  'plain': {},
  'fused blocks': FUSED,
  'fast convolutions': CONVS,
  'both': FUSED | CONVS,
}
# Model, images, height and width in pixels.
CASES = (
  ('nfnet_f0', 4, 192),
  ('nfnet_nano', 64, 32),
  ('nfnet_f0_bn', 4, 192),
  ('efficientnet_b0', 4, 224),
)
COLUMNS = (
  'model',
  'images',
  'pixels',
  'form',
  'seconds',
  'of_plain',
  'least',
  'most',
)


def make_gradient(
  name: str,
  options: dict,
  variables: tuple[dict, dict],
  images: jax.Array,
  labels: jax.Array,
) -> Callable[[], tuple]:
  """Compile the gradient of the cross-entropy as a call without arguments."""
  model = nfnet_jax.create(name, **options)

  def loss(params, state):
    key = jax.random.key(1)
    logits = model.apply(params, state, key, images, True)[0]
    scores = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(scores, labels[:, None], 1))

  gradient = jax.jit(jax.value_and_grad(loss)).lower(*variables).compile()
  return lambda: jax.block_until_ready(gradient(*variables))


def measure(
  name: str, batch: int, size: int, rounds: int
) -> dict[str, list[float]]:
  """Return the seconds of each round by form; each round times every form."""
  model = nfnet_jax.create(name)
  images = jax.random.normal(jax.random.key(2), (batch, size, size, 3))
  labels = jnp.arange(batch)
  variables = jax.jit(lambda key: model.init(key, images, False))(
    jax.random.key(0)
  )
  calls = {
    form: make_gradient(name, options, variables, images, labels)
    for form, options in FORMS.items()
    if model.spec.fast_paths >= options.keys()
  }
  for call in calls.values():
    call()
  seconds = {form: [] for form in calls}
  for _ in range(rounds):
    for form, call in calls.items():
      start = time.perf_counter()
      call()
      seconds[form].append(time.perf_counter() - start)
  return seconds


def rows_of(name: str, batch: int, size: int, rounds: int) -> list[tuple]:
  """Measure a model; ratios are to the plain form in the same round."""
  seconds = measure(name, batch, size, rounds)
  rows = []
  for form, times in seconds.items():
    ratios = [here / plain for here, plain in zip(times, seconds['plain'])]
    numbers = (
      statistics.median(times),
      statistics.median(ratios),
      min(ratios),
      max(ratios),
    )
    rows.append((name, batch, size, form, *(f'{x:.3f}' for x in numbers)))
  return rows


def write(rows: list[tuple], folder: pathlib.Path) -> str:
  """Write the rows, and their table into the README; return the table."""
  with (folder / 'cpu.csv').open('w', newline='') as file:
    csv.writer(file, lineterminator='\n').writerows([COLUMNS, *rows])
  names = [column.replace('_', ' ') for column in COLUMNS]
  right = ['---', '---:', '---:', '---'] + ['---:'] * 4
  lines = [names, right, *([str(cell) for cell in row] for row in rows)]
  table = ''.join(f'| {" | ".join(line)} |\n' for line in lines)
  readme = folder / 'README.md'
  if readme.exists():
    place = r'(?s)(?<=<!-- cpu -->\n).*(?=<!-- end of cpu -->)'
    text = re.sub(place, lambda _: table, readme.read_text())
    readme.write_text(text)
  return table


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=10)
  parser.add_argument('--out', type=pathlib.Path, default=HERE)
  args = parser.parse_args()
  rows = [row for case in CASES for row in rows_of(*case, args.rounds)]
  print(write(rows, args.out), end='')


if __name__ == '__main__':
  main()
