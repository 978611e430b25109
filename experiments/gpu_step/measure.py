"""Time the training step with and without fast paths on one GPU.

Writes results.csv next to this file, and draws results.png and the tables of
README.md from it:

  python experiments/gpu_step/measure.py
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
import concurrent.futures
import csv
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import nfnet_jax
from nfnet_jax import trees
from nfnet_jax.models import complexity, inputs
from nfnet_jax.models.fast import stem
from nfnet_jax.optim import recipe
from nfnet_jax.training import data_parallel
from nfnet_jax.training import state as state_lib
from nfnet_jax.training import step as step_lib

matplotlib.use('agg')
from matplotlib import pyplot as plt

HERE = pathlib.Path(__file__).parent
PLAIN = 'plain'
# Form of the step -> options of the network's constructor.
FORMS = {
  PLAIN: {},
  'fast stem': {'fast_stem': True},
  'fused blocks': {'fused_blocks': True},
  'stem and blocks': {'fast_stem': True, 'fused_blocks': True},
  'fast convolutions': {'fast_convs': True},
  'all': {'fast_stem': True, 'fused_blocks': True, 'fast_convs': True},
}
# Name that may follow a form after a comma -> compiler options.
FLAGS = {
  'NCHW': {'xla_gpu_force_conv_nchw': True},
  'convolution fusion': {'xla_gpu_experimental_enable_conv_fusion': True},
  'no command buffers': {'xla_gpu_enable_command_buffer': ''},
  'autotune level 0': {'xla_gpu_autotune_level': 0},
}
# Placeholder for the fastest form of the first group.
BEST = 'best'
# Placeholder for the forms whose time in the first group was at most TOO_SLOW
# times the plain form's.
CONTENDERS, TOO_SLOW = 'contenders', 1.25
TRAIN, INFER = 'train', 'infer'
TIMM = 'timm'
COLUMNS = (
  'task',
  'model',
  'pixels',
  'batch',
  'compute',
  'form',
  'ms',
  'of_plain',
  'least',
  'most',
  'images_per_s',
  'mfu',
  'memory_gib',
  'compile_s',
  'steps',
  'note',
  'card',
)
WINDOW = 4  # Steps that are dispatched before the clock is read.
THREADS = 6  # Programs that compile in parallel.
TARGET_S = 2.5  # Seconds of timing per program.


@dataclasses.dataclass(frozen=True)
class Group:
  """Forms of one network that are timed in turn, in several rounds."""

  task: str
  model: str
  pixels: int
  batch: int
  forms: Sequence[str]
  compute: str = 'bfloat16'

  @property
  def key(self) -> tuple:
    return self.task, self.model, self.pixels, self.batch, self.compute


# Groups of a wave compile in parallel, and are timed once all have compiled.
WAVES = (
  [Group(TRAIN, 'nfnet_f0', 192, 64, [*FORMS])],
  [
    Group(TRAIN, 'nfnet_f0', 192, 128, [PLAIN, BEST]),
    Group(TRAIN, 'nfnet_f3', 320, 32, [PLAIN, BEST]),
  ],
  [
    Group(TRAIN, 'nfnet_f0', 192, 128, [PLAIN, BEST, 'fused blocks']),
    Group(TRAIN, 'resnet50', 224, 64, [PLAIN]),
    Group(INFER, 'nfnet_f0', 256, 64, [PLAIN, BEST]),
  ],
  [
    Group(TRAIN, 'nfnet_f0', 192, 256, [CONTENDERS]),
    Group(TRAIN, 'nfnet_f0', 192, 32, [CONTENDERS]),
    Group(TRAIN, 'nfnet_f1', 224, 64, [PLAIN, BEST]),
  ],
  [
    Group(
      TRAIN,
      'nfnet_f0',
      192,
      64,
      [PLAIN, BEST, *(f'{BEST}, {flag}' for flag in FLAGS)],
    ),
    Group(TRAIN, 'bn_resnet50', 224, 64, [PLAIN]),
    Group(INFER, 'nfnet_f0', 256, 64, [PLAIN, BEST], 'float32'),
  ],
)
_MINIATURE = 'nfnet_pico', 32, 8
QUICK = (
  [Group(TRAIN, *_MINIATURE, [*FORMS], 'float32')],
  [
    Group(TRAIN, 'senet_pico', 32, 8, [PLAIN], 'float32'),
    Group(TRAIN, *_MINIATURE, [PLAIN, f'{BEST}, NCHW'], 'float32'),
    Group(INFER, *_MINIATURE, [PLAIN, BEST], 'float32'),
  ],
)


def options_of(form: str) -> tuple[dict, dict]:
  """Return the network's and the compiler's options of a form."""
  form, _, flag = form.partition(', ')
  return FORMS[form], FLAGS.get(flag, {})


class Training:
  """The training step of the paper's recipe, on one device."""

  def __init__(self, group: Group, states: dict[str, state_lib.TrainState]):
    self.group = group
    self.parallel = data_parallel.DataParallel(jax.local_devices()[:1])
    self._states = states

  def compile(self, form: str) -> Callable[[], jax.stages.Compiled]:
    """Trace a form's step; return a function that compiles it."""
    network, compiler = options_of(form)
    trainer = self._trainer(network)
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._batch(form)
    )
    state = state_lib.abstract_state(
      trainer.model, trainer.optimizer, self.group.pixels
    )
    lowered = self.parallel.lower(trainer, state, shapes)
    return lambda: lowered.compile(compiler or None)

  def prepare(self, forms: Iterable[str]) -> None:
    """Put the state and each form's batch on the device."""
    if self.group.model not in self._states:
      self.reset()
    self._batches = {
      form: self.parallel.shard_batch(self._batch(form)) for form in forms
    }

  def reset(self) -> None:
    """Create a new state."""
    self._states.pop(self.group.model, None)
    trainer = self._trainer({})
    shapes = state_lib.abstract_state(
      trainer.model, trainer.optimizer, self.group.pixels
    )
    params = make_params(shapes.params)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    state = state._replace(params=params, ema_params=params)
    state = self.parallel.shard_state(trainer, state)
    self._states[self.group.model] = state

  def run(self, form: str, program: jax.stages.Compiled, steps: int) -> float:
    """Make steps from the current state; return seconds per step.

    Raises:
      ArithmeticError: if a step was not applied.
    """
    state = self._states[self.group.model]
    first = int(state.step)
    numbers = [
      self.parallel.shard_batch({'step': np.int32(first + i)})
      for i in range(steps)
    ]
    batch = self._batches[form]
    jax.block_until_ready((state, numbers, batch))
    start = time.perf_counter()
    for number in numbers:
      state, metrics = program(state, {**batch, **number})
    jax.block_until_ready((state, metrics))
    seconds = time.perf_counter() - start
    self._states[self.group.model] = state
    if not metrics['applied']:
      raise ArithmeticError(f'not applied: {jax.device_get(metrics)}')
    return seconds / steps

  def _trainer(self, network: dict) -> step_lib.Trainer:
    batch = self.group.batch
    normalizer_free = self.group.model.startswith('nf')
    steps_per_epoch = 1_281_167 / batch
    schedule = recipe.warmup_cosine(
      0.1 * batch / 256, 5 * steps_per_epoch, 360 * steps_per_epoch
    )
    return step_lib.Trainer(
      model=nfnet_jax.create(
        self.group.model,
        stochdepth_rate=0.25 if normalizer_free else 0.0,
        **network,
      ),
      optimizer=nfnet_jax.nfnet_sgd(
        schedule, clipping=0.01 if normalizer_free else 0
      ),
      schedule=schedule,
      num_classes=1000,
      global_batch=batch,
      compute_dtype=jnp.dtype(self.group.compute),
    )

  def _batch(self, form: str) -> dict[str, np.ndarray]:
    """Return random images with two labels each, as after MixUp or CutMix."""
    rng = np.random.default_rng(0)
    count, size = self.group.batch, self.group.pixels
    images = rng.integers(0, 256, (count, size, size, 3), np.uint8)
    if options_of(form)[0].get('fast_stem'):
      # The input pipeline also delivers blocks.
      images = np.asarray(stem.to_blocks(images))
    return {
      'image': images,
      'label': rng.integers(0, 1000, (count, 2), np.int32),
      'weight': np.full((count, 2), 0.5, np.float32),
      'position': np.arange(count, dtype=np.int32),
      'step': np.int32(0),
    }


class Inference:
  """Inference on images that are on the device."""

  def __init__(self, group: Group):
    self.group = group
    self._dtype = jnp.dtype(group.compute)
    count, size = group.batch, group.pixels
    rng = np.random.default_rng(0)
    self._images = rng.integers(0, 256, (count, size, size, 3), np.uint8)
    self._weights = weight_shapes(group.model, size)

  def compile(self, form: str) -> Callable[[], jax.stages.Compiled]:
    """Trace a form; return a function that compiles it."""
    network, compiler = options_of(form)
    model = nfnet_jax.create(self.group.model, **network)

    def predict(params, state, images):
      images = inputs.normalize_images(images).astype(self._dtype)
      return model.apply(params, state, None, images, False)[0]

    lowered = jax.jit(predict).lower(
      jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, self._dtype), self._weights[0]
      ),
      self._weights[1],
      self._images,
    )
    return lambda: lowered.compile(compiler or None)

  def prepare(self, forms: Iterable[str]) -> None:
    """Put weights and images on the device."""
    params = make_params(self._weights[0])
    params = jax.tree.map(lambda x: jnp.asarray(x, self._dtype), params)
    self._args = params, {}, jax.device_put(self._images)

  def reset(self) -> None:
    """Do nothing: inference has no state."""

  def run(self, form: str, program: jax.stages.Compiled, steps: int) -> float:
    """Return seconds per call."""
    jax.block_until_ready(self._args)
    start = time.perf_counter()
    logits = [program(*self._args) for _ in range(steps)]
    jax.block_until_ready(logits)
    return (time.perf_counter() - start) / steps


class Study:
  """Measures the groups of one wave after the other.

  Each row is written as soon as it is measured. Rows of earlier runs stay until
  their case is measured again.

  Attributes:
    rows: rows of results.csv.
  """

  def __init__(self, folder: pathlib.Path, deadline: float):
    done = (folder / 'results.csv').exists()
    self.rows: list[dict] = read(folder) if done else []
    self._folder = folder
    self._until = time.monotonic() + deadline
    self._pool = concurrent.futures.ThreadPoolExecutor(THREADS)
    self._states = {}
    self._programs = {}
    self._card = jax.devices()[0].device_kind
    self._peak = None

  def is_late(self) -> bool:
    return time.monotonic() > self._until

  def measure_peak(self, size: int) -> None:
    """Time a product of square bfloat16 matrices, as the peak rate of `mfu`."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(k, (size, size), jnp.bfloat16) for k in keys)
    multiply = jax.jit(jnp.matmul)
    times = []
    for _ in range(8):
      jax.block_until_ready(multiply(a, b))
      start = time.perf_counter()
      jax.block_until_ready([multiply(a, b) for _ in range(10)])
      times.append((time.perf_counter() - start) / 10)
    seconds = statistics.median(times[2:])
    self._peak = 2 * size**3 / seconds
    note = f'{size} x {size} matrices, {self._peak / 1e12:.0f} TFLOP/s'
    self.add(
      {'task': 'matmul', 'compute': 'bfloat16', 'note': note},
      ms=f'{1e3 * seconds:.3f}',
    )

  def add(self, row: dict, **values) -> None:
    """Add a row, write all rows and print the new one."""
    row = {**dict.fromkeys(COLUMNS, ''), 'card': self._card, **row, **values}
    key = key_of(row)
    self.rows = [kept for kept in self.rows if key_of(kept) != key] + [row]
    write(self.rows, self._folder)
    print(*(value for value in row.values() if value != ''), flush=True)

  def measure(self, wave: Sequence[Group]) -> None:
    """Compile the wave's programs in parallel, then time its groups."""
    subjects, cases = {}, []
    for group in wave:
      forms = self._resolve(group.forms)
      group = dataclasses.replace(group, forms=forms)
      subject = (
        Training(group, self._states)
        if group.task == TRAIN
        else Inference(group)
      )
      subjects[group.key] = group, subject
      cases += [
        (place, group, form)
        for place, form in enumerate(forms)
        if (*group.key, form) not in self._programs
      ]
    jobs = {}
    # The first form of all groups, then the second: later ones reuse the tuning
    # of convolutions with the same shapes.
    for _, group, form in sorted(cases, key=lambda case: case[0]):
      if self.is_late():
        self._fail(group, form, 'not reached before the deadline')
        continue
      try:
        compile_program = subjects[group.key][1].compile(form)
        jobs[*group.key, form] = self._pool.submit(timed, compile_program)
      except Exception as error:
        self._fail(group, form, describe(error))
    left = max(self._until - time.monotonic(), 0)
    concurrent.futures.wait(jobs.values(), timeout=left)
    for group, subject in subjects.values():
      for form in group.forms:
        case = *group.key, form
        job = jobs.get(case)
        if not job:
          continue
        if not job.done():
          self._fail(group, form, 'not compiled before the deadline')
        elif job.exception():
          self._fail(group, form, describe(job.exception()))
        else:
          self._programs[case] = job.result()
      try:
        if any((*group.key, form) in self._programs for form in group.forms):
          subject.prepare(group.forms)
          self._time(group, subject)
      except Exception as error:
        self._fail(group, '', describe(error))

  def _resolve(self, forms: Sequence[str]) -> tuple[str, ...]:
    """Replace BEST and CONTENDERS by forms."""
    ratios = {PLAIN: 1.0}
    for row in self.rows:
      if row['form'] in FORMS and row['of_plain']:
        ratios.setdefault(row['form'], float(row['of_plain']))
    best = min(ratios, key=ratios.get)
    resolved = []
    for form in forms:
      if form == CONTENDERS:
        resolved += [name for name, x in ratios.items() if x <= TOO_SLOW]
      else:
        resolved.append(form.replace(BEST, best))
    return tuple(dict.fromkeys(resolved))

  def _time(self, group: Group, subject: Training | Inference) -> None:
    """Time a group's programs in turn; ratios are within rounds."""
    seconds = {}
    for form in group.forms:
      case = *group.key, form
      if case in self._programs:
        try:
          subject.run(form, self._programs[case][0], 3)
          seconds[form] = [subject.run(form, self._programs[case][0], WINDOW)]
        except Exception as error:
          self._fail(group, form, describe(error))
          subject.reset()
    if not seconds:
      return
    slowest = max(times[0] for times in seconds.values())
    rounds = min(max(round(TARGET_S / slowest / WINDOW), 5), 20)
    for times in seconds.values():
      times.clear()
    for index in range(rounds):
      for form in [*seconds][:: 1 if index % 2 else -1]:
        program = self._programs[*group.key, form][0]
        seconds[form].append(subject.run(form, program, WINDOW))
    for form, times in seconds.items():
      self._add_times(group, form, times, seconds.get(PLAIN))

  def _add_times(
    self, group: Group, form: str, times: list, plain: list | None
  ) -> None:
    program, compile_s = self._programs[*group.key, form]
    ratios = [here / base for here, base in zip(times, plain or times)]
    median = statistics.median(times)
    values = {
      'ms': f'{1e3 * median:.2f}',
      'images_per_s': f'{group.batch / median:.0f}',
      'memory_gib': f'{memory(program) / 2**30:.2f}',
      'compile_s': f'{compile_s:.0f}',
      'steps': len(times) * WINDOW,
    }
    if plain:
      values |= {
        'of_plain': f'{statistics.median(ratios):.3f}',
        'least': f'{min(ratios):.3f}',
        'most': f'{max(ratios):.3f}',
      }
    if self._peak:
      passes = 3 if group.task == TRAIN else 1
      macs = count_macs(group.model, group.pixels)
      flops = 2 * passes * macs * group.batch
      values['mfu'] = f'{flops / median / self._peak:.3f}'
    self.add(row_of(group, form), **values)

  def _fail(self, group: Group, form: str, note: str) -> None:
    self.add(row_of(group, form), note=note)

  def time_timm(self, group: Group) -> None:
    """Time timm's network of the same name in a separate process."""
    command = [sys.executable, HERE / 'timm_step.py']
    command += [f'dm_{group.model}', str(group.pixels), str(group.batch)]
    try:
      done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, check=False
      )
      if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
      for form, values in json.loads(done.stdout).items():
        seconds = values.pop('seconds')
        self.add(
          row_of(dataclasses.replace(group, task=TIMM), form),
          ms=f'{1e3 * seconds:.2f}',
          images_per_s=f'{group.batch / seconds:.0f}',
          **values,
        )
    except Exception as error:
      row = row_of(dataclasses.replace(group, task=TIMM), 'eager')
      self.add(row, note=describe(error))


def timed(function: Callable) -> tuple:
  """Return a call's result and its seconds."""
  start = time.monotonic()
  return function(), time.monotonic() - start


def memory(program: jax.stages.Compiled) -> int:
  """Return the bytes of a program's arguments, results and temporaries."""
  sizes = program.memory_analysis()
  return (
    sizes.argument_size_in_bytes
    + sizes.output_size_in_bytes
    - sizes.alias_size_in_bytes
    + sizes.temp_size_in_bytes
  )


@functools.cache
def count_macs(model: str, pixels: int) -> int:
  """Count the multiply-adds of an image in the plain network."""
  weights = weight_shapes(model, pixels)
  return complexity.count_image_macs(nfnet_jax.create(model), *weights, pixels)


@functools.cache
def weight_shapes(model: str, pixels: int) -> tuple[dict, dict]:
  """Return the shapes of a network's parameters and of its state."""
  network = nfnet_jax.create(model)
  images = jnp.zeros((1, pixels, pixels, 3))
  init = lambda key: network.init(key, images, False)
  return jax.eval_shape(init, jax.random.key(0))


def make_params(shapes: dict) -> dict:
  """Fill parameters on the host: on a GPU, compiling `init` takes long."""
  rng = np.random.default_rng(0)
  constants = {'gain': 1, 'scale': 1, 'skip_gain': 0.1}

  def fill(path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    name = path.rpartition('/')[2]
    if name == 'w':
      scale = np.float32(math.prod(leaf.shape[:-1]) ** -0.5)
      return rng.standard_normal(leaf.shape, np.float32) * scale
    return np.full(leaf.shape, constants.get(name, 0), np.float32)

  return trees.map_named(fill, shapes)


def describe(error: BaseException) -> str:
  """Return an error's type and the first line of its message."""
  lines = str(error).strip().splitlines() or ['']
  return f'{type(error).__name__}: {lines[0][:160]}'


def key_of(row: dict) -> tuple:
  return tuple(str(row[name]) for name in COLUMNS[:6])


def row_of(group: Group, form: str) -> dict:
  fields = dataclasses.asdict(group)
  return {name: fields[name] for name in COLUMNS[:5]} | {'form': form}


def read(folder: pathlib.Path) -> list[dict[str, str]]:
  with (folder / 'results.csv').open(newline='') as file:
    return list(csv.DictReader(file))


def write(rows: list[dict], folder: pathlib.Path) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / 'results.csv').open('w', newline='') as file:
    writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)


# Columns of the README's table, and those of them that hold text.
SHOWN = tuple(name for name in COLUMNS if name not in ('steps', 'note', 'card'))
WORDS = 'task', 'model', 'compute', 'form'


def table(rows: list[dict]) -> str:
  """Format the rows that have times."""
  lines = [
    [name.replace('_', ' ') for name in SHOWN],
    ['---' if name in WORDS else '---:' for name in SHOWN],
  ]
  lines += [
    [str(row[name]) or '-' for name in SHOWN]
    for row in rows
    if row['form'] and row['ms']
  ]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def draw(rows: list[dict], path: pathlib.Path) -> None:
  """Draw the time of each form relative to plain, by model and batch."""
  groups = {}
  for row in rows:
    if row['task'] == TRAIN and row['form'] in FORMS and row['of_plain']:
      name = row['model'].removeprefix('nfnet_').upper()
      label = f'{name}, {row["pixels"]} px\nbatch {row["batch"]}'
      ratio = float(row['of_plain'])
      errors = ratio - float(row['least']), float(row['most']) - ratio
      groups.setdefault(label, {}).setdefault(row['form'], (ratio, errors))
  groups = {label: forms for label, forms in groups.items() if len(forms) > 1}
  if not groups:
    return
  figure, axis = plt.subplots(figsize=(10, 4), layout='constrained')
  for index, form in enumerate(FORMS):
    places, ratios, errors = [], [], []
    for place, forms in enumerate(groups.values()):
      if form in forms:
        places.append(place + (index - len(FORMS) / 2 + 0.5) * 0.14)
        ratios.append(forms[form][0])
        errors.append(forms[form][1])
    if places:
      axis.bar(
        places, ratios, 0.14, yerr=np.transpose(errors), label=form, capsize=2
      )
  axis.axhline(1, color='k', lw=0.8)
  axis.set_ylim(0.7, 1.35)  # Cuts the error bar of a round that stalled.
  axis.set_xticks(range(len(groups)), [*groups], fontsize=8)
  axis.set_ylabel("time per step, share of plain's")
  axis.set_title(rows[0]['card'], fontsize=9)
  axis.legend(fontsize=8, loc='upper right')
  figure.savefig(path, dpi=110)
  plt.close(figure)


def report(folder: pathlib.Path) -> None:
  """Draw the figure, and update the table of the README if there is one."""
  rows = read(folder)
  draw(rows, folder / 'results.png')
  readme = folder / 'README.md'
  if readme.exists():
    place = r'(?s)(?<=<!-- results -->\n).*(?=<!-- end -->)'
    text = re.sub(place, lambda _: table(rows), readme.read_text())
    readme.write_text(text)
  print(table(rows), end='')


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--out', type=pathlib.Path, default=HERE)
  parser.add_argument(
    '--deadline',
    type=float,
    default=3600,
    metavar='SECONDS',
    help='time after which no compilation starts',
  )
  parser.add_argument(
    '--quick', action='store_true', help='a trial on miniature networks'
  )
  parser.add_argument(
    '--waves', type=int, nargs='+', help='numbers of the waves, from 0'
  )
  parser.add_argument(
    '--report', action='store_true', help='only draw the rows of results.csv'
  )
  args = parser.parse_args()
  if args.report:
    return report(args.out)
  # Leave memory for timm's process. JAX reads this when it initialises devices.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  waves = QUICK if args.quick else WAVES
  study = Study(args.out, args.deadline)
  study.measure_peak(256 if args.quick else 8192)
  for index in args.waves or range(len(waves)):
    if not study.is_late():
      study.measure(waves[index])
    if index == 1:
      study.time_timm(waves[0][0])
  peak = (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use', 0)
  print(f'peak of the process: {peak / 2**30:.2f} GiB', flush=True)
  report(args.out)
  os._exit(0)  # Without waiting for compilations.


if __name__ == '__main__':
  main()
