"""Time the training step with and without fast paths on one GPU.

Writes results.csv next to this file, and draws results.png and the tables of
README.md from it:

  python experiments/gpu_step/measure.py
"""

import argparse
from collections.abc import Sequence
import dataclasses
import gzip
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import jax
import jax.numpy as jnp
import programs
import results
import waves

HERE = pathlib.Path(__file__).parent
TIMM_LIMIT_S = 150
TARGET_S = 2.5  # Seconds of timing per program.


class Study:
  """Measures the groups of one wave after the other.

  Each row is written as soon as it is measured. Rows of earlier runs stay until
  their case is measured again.

  Attributes:
    rows: rows of results.csv.
  """

  def __init__(self, folder: pathlib.Path, deadline: float):
    done = (folder / 'results.csv').exists()
    self.rows: list[dict] = results.read(folder) if done else []
    self._folder = folder
    self._until = time.monotonic() + deadline
    self._states = {}
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
    row = {
      **dict.fromkeys(results.COLUMNS, ''),
      'card': self._card,
      **row,
      **values,
    }
    key = key_of(row)
    self.rows = [kept for kept in self.rows if key_of(kept) != key] + [row]
    results.write(self.rows, self._folder)
    print(*(value for value in row.values() if value != ''), flush=True)

  def measure(
    self, wave: Sequence[programs.Group], profiled: str | None = None
  ) -> None:
    """Compile and time the forms of a wave one after the other.

    Each form takes turns with the first of its group. Nothing compiles beside
    the timing, because the compiler tries kernels on the GPU.

    Args:
      wave: the groups; those of timm run first, in processes of their own.
      profiled: form that is also traced.
    """
    rivals = [group for group in wave if group.task == programs.TIMM]
    rivals = [
      threading.Thread(target=self._time_timm, args=[g]) for g in rivals
    ]
    for rival in rivals:
      rival.start()
    # To trace a program needs no GPU, which timm has in the meantime.
    cases = [
      self._prepare(group) for group in wave if group.task != programs.TIMM
    ]
    for rival in rivals:
      rival.join()
    for group, subject, lowered in cases:
      compiled = {}
      for form in group.forms:
        try:
          self._compile(group, form, lowered, compiled)
          subject.prepare(compiled)
          self._time(group, subject, compiled, form)
          if form == profiled:
            self._trace(group, subject, compiled)
        except Exception as error:
          self._fail(group, form, describe(error))
          subject.reset()

  def _prepare(self, group: programs.Group) -> tuple:
    """Return a group with its forms, what runs them, and their programs."""
    forms = self._resolve(group.forms)
    group = dataclasses.replace(group, forms=forms)
    subject = (
      programs.Training(group, self._states)
      if group.task == programs.TRAIN
      else programs.Inference(group)
    )
    networks = dict.fromkeys(form.partition(', ')[0] for form in forms)
    return group, subject, {name: subject.trace(name) for name in networks}

  def _compile(
    self, group: programs.Group, form: str, lowered: dict, compiled: dict
  ) -> None:
    """Add a form's program, and its seconds of compilation, to `compiled`."""
    if self.is_late():
      raise TimeoutError('not reached before the deadline')
    network, _, flag = form.partition(', ')
    start = time.monotonic()
    program = lowered[network].compile(programs.FLAGS.get(flag))
    seconds = time.monotonic() - start
    compiled[form] = program, seconds
    print(f'{group.model}, {form}: compiled in {seconds:.0f} s', flush=True)

  def _resolve(self, forms: Sequence[str]) -> tuple[str, ...]:
    """Replace BEST by a form."""
    ratios = {programs.PLAIN: 1.0}
    for row in self.rows:
      if row['form'] in programs.FORMS and row['of_first']:
        ratios.setdefault(row['form'], float(row['of_first']))
    best = min(ratios, key=ratios.get)
    resolved = [form.replace(waves.BEST, best) for form in forms]
    return tuple(dict.fromkeys(resolved))

  def _time(
    self,
    group: programs.Group,
    subject: programs.Training | programs.Inference,
    compiled: dict,
    form: str,
  ) -> None:
    """Time a form in turn with the first one; ratios are within rounds."""
    first = next(iter(compiled))
    seconds = {name: [] for name in (first, form)}
    slowest = 0
    for name in seconds:
      subject.run(name, compiled[name][0], 3)
      trial = subject.run(name, compiled[name][0], programs.WINDOW)
      slowest = max(slowest, trial)
    rounds = min(max(round(TARGET_S / slowest / programs.WINDOW), 5), 20)
    for index in range(rounds):
      for name in [*seconds][:: 1 if index % 2 else -1]:
        window = subject.run(name, compiled[name][0], programs.WINDOW)
        seconds[name].append(window)
    self._add_times(group, form, seconds[form], seconds[first], compiled[form])

  def _trace(
    self,
    group: programs.Group,
    subject: programs.Training | programs.Inference,
    compiled: dict,
  ) -> None:
    """Write a trace of one window of the last form, and its HLO text."""
    form = [*compiled][-1]
    program = compiled[form][0]
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
      with jax.profiler.trace(folder, profiler_options=options):
        subject.run(form, program, programs.WINDOW)
      (trace,) = pathlib.Path(folder).rglob('*.xplane.pb')
      files = {'xplane.pb': trace.read_bytes()}
    files['hlo.txt'] = program.as_text().encode()
    name = f'{group.task}-{group.model}-{group.batch}'
    for suffix, content in files.items():
      path = self._folder / f'{name}.{suffix}.gz'
      path.write_bytes(gzip.compress(content))

  def _add_times(
    self,
    group: programs.Group,
    form: str,
    times: list,
    first: list,
    compiled: tuple[jax.stages.Compiled, float],
  ) -> None:
    program, compile_s = compiled
    ratios = [here / base for here, base in zip(times, first)]
    median = statistics.median(times)
    values = {
      'ms': f'{1e3 * median:.2f}',
      'images_per_s': f'{group.batch / median:.0f}',
      'memory_gib': f'{programs.memory(program) / 2**30:.2f}',
      'compile_s': f'{compile_s:.0f}',
      'steps': len(times) * programs.WINDOW,
      'of_first': f'{statistics.median(ratios):.3f}',
      'least': f'{min(ratios):.3f}',
      'most': f'{max(ratios):.3f}',
    }
    if self._peak:
      passes = 3 if group.task == programs.TRAIN else 1
      macs = programs.count_macs(group.model, group.pixels)
      flops = 2 * passes * macs * group.batch
      values['mfu'] = f'{flops / median / self._peak:.3f}'
    self.add(row_of(group, form), **values)

  def _fail(self, group: programs.Group, form: str, note: str) -> None:
    self.add(row_of(group, form), note=note)

  def _time_timm(self, group: programs.Group) -> None:
    """Time forms of timm's network of the same name in another process."""
    command = [sys.executable, HERE / 'timm_step.py', group.model]
    command += [str(group.pixels), str(group.batch), '--forms', *group.forms]
    process = subprocess.Popen(
      command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    limit = threading.Timer(TIMM_LIMIT_S, process.kill)
    limit.start()
    forms = [*group.forms]
    for line in process.stdout:
      values = json.loads(line)
      seconds = values.pop('seconds')
      self.add(
        row_of(group, forms.pop(0)),
        ms=f'{1e3 * seconds:.2f}',
        images_per_s=f'{group.batch / seconds:.0f}',
        **values,
      )
    error = process.stderr.read().strip().splitlines() or ['']
    limit.cancel()
    if forms:
      note = error[-1][:160] or f'not ready after {TIMM_LIMIT_S} seconds'
      self._fail(group, forms[0], note)


def describe(error: BaseException) -> str:
  """Return an error's type and the first line of its message."""
  lines = str(error).strip().splitlines() or ['']
  return f'{type(error).__name__}: {lines[0][:160]}'


def key_of(row: dict) -> tuple:
  return tuple(str(row[name]) for name in results.COLUMNS[:6])


def row_of(group: programs.Group, form: str) -> dict:
  fields = dataclasses.asdict(group)
  return {name: fields[name] for name in results.COLUMNS[:5]} | {'form': form}


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
    '--waves',
    nargs='+',
    metavar='NAME',
    help=f'some of {", ".join(waves.WAVES)}; all if left out',
  )
  parser.add_argument(
    '--report', action='store_true', help='only draw the rows of results.csv'
  )
  parser.add_argument(
    '--profile',
    metavar='FORM',
    help='also trace this form, for kernels.py',
  )
  args = parser.parse_args()
  if args.report:
    return results.report(args.out)
  # Leave memory for timm's process. JAX reads this when it initialises devices.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  chosen = waves.QUICK if args.quick else waves.WAVES
  study = Study(args.out, args.deadline)
  study.measure_peak(256 if args.quick else 8192)
  for name in args.waves or chosen:
    if not study.is_late():
      study.measure(chosen[name], args.profile)
  peak = (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use', 0)
  print(f'peak of the process: {peak / 2**30:.2f} GiB', flush=True)
  results.report(args.out)


if __name__ == '__main__':
  main()
