"""Time the training step with and without fast paths on one GPU.

Writes results.csv next to this file, and draws results.png and the tables of
README.md from it:

  python experiments/gpu_step/measure.py
"""

import argparse
from collections.abc import Callable, Sequence
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import programs
import results
import waves

HERE = pathlib.Path(__file__).parent
TIMM = 'timm'
THREADS = 6  # Programs that compile in parallel.
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

  def measure(self, wave: Sequence[programs.Group]) -> None:
    """Compile the wave's programs in parallel, then time its groups."""
    subjects, cases = {}, []
    for group in wave:
      forms = self._resolve(group.forms)
      group = dataclasses.replace(group, forms=forms)
      subject = (
        programs.Training(group, self._states)
        if group.task == programs.TRAIN
        else programs.Inference(group)
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
    _, pending = concurrent.futures.wait(jobs.values(), timeout=left)
    for job in pending:
      job.cancel()
    # A compilation tries kernels on the GPU, so none may run beside the timing.
    concurrent.futures.wait(jobs.values())
    for group, subject in subjects.values():
      for form in group.forms:
        case = *group.key, form
        job = jobs.get(case)
        if not job:
          continue
        if job.cancelled():
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
    ratios = {programs.PLAIN: 1.0}
    for row in self.rows:
      if row['form'] in programs.FORMS and row['of_plain']:
        ratios.setdefault(row['form'], float(row['of_plain']))
    best = min(ratios, key=ratios.get)
    resolved = []
    for form in forms:
      if form == waves.CONTENDERS:
        resolved += [name for name, x in ratios.items() if x <= waves.TOO_SLOW]
      else:
        resolved.append(form.replace(waves.BEST, best))
    return tuple(dict.fromkeys(resolved))

  def _time(
    self, group: programs.Group, subject: programs.Training | programs.Inference
  ) -> None:
    """Time a group's programs in turn; ratios are within rounds."""
    seconds = {}
    for form in group.forms:
      case = *group.key, form
      if case in self._programs:
        try:
          subject.run(form, self._programs[case][0], 3)
          seconds[form] = [
            subject.run(form, self._programs[case][0], programs.WINDOW)
          ]
        except Exception as error:
          self._fail(group, form, describe(error))
          subject.reset()
    if not seconds:
      return
    slowest = max(times[0] for times in seconds.values())
    rounds = min(max(round(TARGET_S / slowest / programs.WINDOW), 5), 20)
    for times in seconds.values():
      times.clear()
    for index in range(rounds):
      for form in [*seconds][:: 1 if index % 2 else -1]:
        program = self._programs[*group.key, form][0]
        seconds[form].append(subject.run(form, program, programs.WINDOW))
    for form, times in seconds.items():
      self._add_times(group, form, times, seconds.get(programs.PLAIN))

  def _add_times(
    self, group: programs.Group, form: str, times: list, plain: list | None
  ) -> None:
    program, compile_s = self._programs[*group.key, form]
    ratios = [here / base for here, base in zip(times, plain or times)]
    median = statistics.median(times)
    values = {
      'ms': f'{1e3 * median:.2f}',
      'images_per_s': f'{group.batch / median:.0f}',
      'memory_gib': f'{programs.memory(program) / 2**30:.2f}',
      'compile_s': f'{compile_s:.0f}',
      'steps': len(times) * programs.WINDOW,
    }
    if plain:
      values |= {
        'of_plain': f'{statistics.median(ratios):.3f}',
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

  def time_timm(self, group: programs.Group) -> None:
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
    '--waves', type=int, nargs='+', help='numbers of the waves, from 0'
  )
  parser.add_argument(
    '--report', action='store_true', help='only draw the rows of results.csv'
  )
  args = parser.parse_args()
  if args.report:
    return results.report(args.out)
  # Leave memory for timm's process. JAX reads this when it initialises devices.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  chosen = waves.QUICK if args.quick else waves.WAVES
  study = Study(args.out, args.deadline)
  study.measure_peak(256 if args.quick else 8192)
  for index in args.waves or range(len(chosen)):
    if not study.is_late():
      study.measure(chosen[index])
    if index == 1:
      study.time_timm(chosen[0][0])
  peak = (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use', 0)
  print(f'peak of the process: {peak / 2**30:.2f} GiB', flush=True)
  results.report(args.out)


if __name__ == '__main__':
  main()
