"""The summary that a run logs when it ends."""

from __future__ import annotations

import math
import os

from etils import epath
import jax

from nfnet_jax.distributed import processes
from nfnet_jax.training import evaluation, goodput, loop, timing

_PARTS = (
  timing.TRAINING,
  timing.COMPILING,
  timing.EVALUATING,
  timing.SAVING,
  timing.OTHER,
)


def numbers(run: loop.Loop) -> dict[str, float]:
  """Return what a run took, for `--json`; NaN for what is not known.

  Args:
    run: a run that has ended.
  """
  seconds, speed = run.stopwatch.seconds, run.throughput.overall()
  return {
    'steps': run.throughput.steps,
    'seconds': run.stopwatch.total(),
    'train_s': seconds(timing.TRAINING, timing.DATA),
    'compile_s': seconds(timing.COMPILING),
    'eval_s': seconds(timing.EVALUATING),
    'save_s': seconds(timing.SAVING),
    'images_per_second': speed.get('images_per_second', math.nan),
    'data_wait': speed.get('data_wait', math.nan),
    'goodput': run.goodput.shares()['goodput'],
    'best_top1': _best(run, evaluation.RAW)[0],
    'best_ema_top1': _best(run, evaluation.EMA)[0],
    'peak_bytes': peak_bytes() or math.nan,
  }


def summary(run: loop.Loop, workdir: str | os.PathLike) -> str:
  """Return the results of a finished run, what it took, and where it is.

  Args:
    run: a run after its last step.
    workdir: its folder.
  """
  total, results = run.cadence.total, run.writer.evaluations
  best = ', '.join(
    f'{100 * top1:.2f} % {label} at step {step:,}'
    for label, (top1, step) in {
      'raw': _best(run, evaluation.RAW),
      'EMA': _best(run, evaluation.EMA),
    }.items()
  )
  peak = peak_bytes()
  return '\n'.join(
    [
      evaluation.report(results[total]),
      f'best       top-1 {best}',
      f'steps      {run.throughput.steps:,} here, {total:,} in all',
      f'time       {_time(run)}',
      f'speed      {_speed(run)}',
      f'goodput    {_goodput(run)}',
      *(
        [f'memory     {peak / 2**30:.2f} GiB at most per device']
        if peak
        else []
      ),
      f'checkpoint {epath.Path(workdir) / "checkpoints" / str(total)}',
    ]
  )


def interrupted(run: loop.Loop, step: int, workdir: str | os.PathLike) -> str:
  """Return how far an interrupted run came.

  Args:
    run: a run that has stopped and saved.
    step: the step that it reached.
    workdir: its folder.
  """
  seconds = run.stopwatch.total()
  return (
    f'Interrupted and saved at step {step:,} of {run.cadence.total:,}, '
    f'{run.throughput.steps:,} of them here in {_duration(seconds)} '
    f'({_speed(run)}). The same command resumes from {workdir}.'
  )


def peak_bytes() -> int | None:
  """Return the peak memory of the devices here, None if it is not known."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [each.get('peak_bytes_in_use', 0) for each in stats]
  return max(peaks) or None


def _best(run: loop.Loop, kind: str) -> tuple[float, int]:
  """Return the best top-1 of a kind of weights, and its step."""
  return max(
    (row[f'{kind}/top1'], step) for step, row in run.writer.evaluations.items()
  )


def _time(run: loop.Loop) -> str:
  """Return where the time went; waiting for data is a part of training."""
  spent = {part: run.stopwatch.seconds(part) for part in _PARTS}
  spent[timing.TRAINING] += run.stopwatch.seconds(timing.DATA)
  parts = [f'{part} {_duration(spent[part])}' for part in _PARTS if spent[part]]
  return f'{_duration(run.stopwatch.total())}: {", ".join(parts)}'


def _goodput(run: loop.Loop) -> str:
  """Return what the time since the first start went into, in per cent."""
  spent = run.goodput.seconds()
  total = sum(spent.values()) or 1.0
  useful = spent.pop(goodput.STEPS)
  others = [
    f'{name} {100 * seconds / total:.0f} %'
    for name, seconds in spent.items()
    if seconds >= total / 200
  ]
  return (
    f'{100 * useful / total:.0f} % of {_duration(total)} since the first start '
    f'went into steps that count; {", ".join(others)}'
  )


def _speed(run: loop.Loop) -> str:
  """Return images per second, of all devices and per device."""
  speed = run.throughput.overall()
  if not speed:
    return 'no step was timed'
  rate = speed['images_per_second']
  each = rate / jax.device_count()
  per_device = f' ({each:,.0f} per device)' if processes.are_several() else ''
  return (
    f'{rate:,.0f} images/s{per_device}, waiting for data '
    f'{100 * speed["data_wait"]:.0f} % of the time'
  )


def _duration(seconds: float) -> str:
  for unit, size in (('h', 3600), ('min', 60)):
    if seconds >= 2 * size:
      return f'{seconds / size:.1f} {unit}'
  return f'{seconds:.1f} s'
