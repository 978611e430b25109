"""What a run says about itself when it ends."""

import math
import os

from etils import epath
import jax

from nfnet_jax.distributed import processes
from nfnet_jax.training import evaluation, loop, timing

_PARTS = (
  timing.TRAINING,
  timing.COMPILING,
  timing.EVALUATING,
  timing.SAVING,
  timing.OTHER,
)


def numbers(run: loop.Loop) -> dict[str, float]:
  """Returns what a run took, for `--json`; NaN where that is not known.

  Args:
    run: that has ended.
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
    'best_top1': _best(run, evaluation.RAW)[0],
    'best_ema_top1': _best(run, evaluation.EMA)[0],
    'peak_bytes': peak_bytes() or math.nan,
  }


def summary(run: loop.Loop, workdir: str | os.PathLike) -> str:
  """Says how a finished run went, what it took, and where it is.

  Args:
    run: that has made its last step.
    workdir: where it is.
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
      *(
        [f'memory     {peak / 2**30:.2f} GiB at most a device'] if peak else []
      ),
      f'checkpoint {epath.Path(workdir) / "checkpoints" / str(total)}',
    ]
  )


def interrupted(run: loop.Loop, step: int, workdir: str | os.PathLike) -> str:
  """Says how far a run came that was asked to stop.

  Args:
    run: that has stopped and saved.
    step: that it reached.
    workdir: where it is.
  """
  duration = _duration(run.stopwatch.total())
  return (
    f'Interrupted and saved at step {step:,} of {run.cadence.total:,}, '
    f'{run.throughput.steps:,} of them here in {duration} ({_speed(run)}). The '
    f'same command resumes from {workdir}.'
  )


def peak_bytes() -> int | None:
  """Returns the most memory that a device here has held, if it tells."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [each.get('peak_bytes_in_use', 0) for each in stats]
  return max(peaks) or None


def _best(run: loop.Loop, kind: str) -> tuple[float, int]:
  """Returns the best top-1 of a kind of weights, and its step."""
  return max(
    (row[f'{kind}/top1'], step) for step, row in run.writer.evaluations.items()
  )


def _time(run: loop.Loop) -> str:
  """Says where the time went; waiting for data is a part of training."""
  spent = {part: run.stopwatch.seconds(part) for part in _PARTS}
  spent[timing.TRAINING] += run.stopwatch.seconds(timing.DATA)
  parts = [f'{part} {_duration(spent[part])}' for part in _PARTS if spent[part]]
  return f'{_duration(run.stopwatch.total())}: {", ".join(parts)}'


def _speed(run: loop.Loop) -> str:
  """Says how many images a second that made, of all devices and of each."""
  speed = run.throughput.overall()
  if not speed:
    return 'no step was timed'
  rate = speed['images_per_second']
  each = rate / jax.device_count()
  a_device = f' ({each:,.0f} per device)' if processes.are_several() else ''
  return (
    f'{rate:,.0f} images/s{a_device}, waiting for data '
    f'{100 * speed["data_wait"]:.0f} % of the time'
  )


def _duration(seconds: float) -> str:
  for unit, size in (('h', 3600), ('min', 60)):
    if seconds >= 2 * size:
      return f'{seconds / size:.1f} {unit}'
  return f'{seconds:.1f} s'
