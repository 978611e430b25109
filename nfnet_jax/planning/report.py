"""Plans as text: a summary, a comparison, a ranking, cycles by category."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nfnet_jax.planning import costs, estimate, search, topology

# Estimates against measurements; see experiments/plan_calibration/.
_CALIBRATION = (
  'Measured steps of F0 to F3 on TPU v3, without fast paths, took 1.22 to 1.32 '
  'times as long as estimated'
)
_BAR = 24


def summary(plan: estimate.Plan) -> str:
  """Format one plan, a line per subject, and its cycles by category."""
  if not plan.schedule:
    return overview(plan)
  return f'{overview(plan)}\n\n{breakdown(plan.schedule)}'


def overview(plan: estimate.Plan) -> str:
  """Format one plan, a line per subject."""
  row, work = plan.numbers(), plan.workload
  lines = [
    f'plan         {work.config}: {work.model} at {work.image_size} px, '
    f'{work.dtype}',
    f'pod          {plan.pod.name}: {_pod(row)}',
    f'batch        {work.batch:,}: {_batch(row)}',
    f'fast paths   {_fast_paths(plan)}',
    f'state        {_state(row)}',
    f'memory       {_memory(row)}',
  ]
  if not plan.schedule:
    return '\n'.join(lines)
  lines += [
    f'work         {flops(row["flops_per_step"])} per step, model FLOPs '
    f'{flops(row["model_flops_per_step"])}',
    f'step         {_step(row)}',
    f'collectives  {size(row["collective_bytes"])} per step, '
    f'{row["collective_ms_by_bandwidth"]:.1f} ms at the bandwidth of the links'
    f'{_waiting(row)}: not in the step time, and not from the compiler',
  ]
  if row['step_ms'] is not None:
    lines += _schedule_lines(plan, row)
  lines.append(f'estimate     {_kind(plan, row)}')
  return '\n'.join(lines)


def _pod(row: dict[str, Any]) -> str:
  kind = topology.parse(row['topology'])
  hosts = f'{row["hosts"]} host{"s" if row["hosts"] > 1 else ""}'
  if row['device'] == 'chip':
    return f'{row["chips"]} chips {kind.chip}, {hosts}'
  return f'{row["devices"]} cores of {row["chips"]} chips {kind.chip}, {hosts}'


def _batch(row: dict[str, Any]) -> str:
  parts = [f'{row["batch_per_device"]} per {row["device"]}']
  if row['accumulate'] > 1:
    parts.append(f'{row["accumulate"]} microbatches')
  if row['remat']:
    parts.append('blocks recomputed')
  return ', '.join(parts)


def _fast_paths(plan: estimate.Plan) -> str:
  work = plan.workload
  titles = [work.fast_path_titles[name] for name in work.fast_paths]
  return ', '.join(titles) or 'none'


def _state(row: dict[str, Any]) -> str:
  whole, parameters = size(row['state_bytes']), size(row['parameter_bytes'])
  if not row['shard_update']:
    return f'{whole} per {row["device"]}, of which parameters {parameters}'
  local = size(row['state_bytes_per_device'])
  return (
    f'{whole} in total, of which parameters {parameters}; {local} per '
    f'{row["device"]}'
  )


def _memory(row: dict[str, Any]) -> str:
  peak, available = row['peak_bytes'], row['available_bytes']
  if row['fits']:
    return (
      f'{size(peak)} of {size(available)} per {row["device"]}: '
      f'{size(available - peak)} to spare; arguments '
      f'{size(row["argument_bytes"])}, temporary {size(row["temp_bytes"])}'
    )
  return (
    f'{size(peak)} needed, {size(available)} available per {row["device"]}: '
    f'does not fit by {size(row["lacking_bytes"])}\n'
    f'largest      {_largest(row)}'
  )


def _largest(row: dict[str, Any]) -> str:
  largest, device = row['largest_batch_per_device'], row['device']
  tried = ', '.join(str(batch) for batch in row['tried_batch_per_device'])
  if not largest:
    return f'no smaller batch that fits was found (compiled: {tried or "none"})'
  flags = f'--config.batch_size={row["largest_batch_size"]}'
  for name, value in row['largest_batch_settings'].items():
    flags += f' --config.{name}={value}'
  return f'{largest} per {device} fit: {flags} (compiled: {tried})'


def _step(row: dict[str, Any]) -> str:
  cycles = f'{row["step_cycles"] / 1e6:,.2f} M cycles'
  clock = topology.parse(row['topology']).clock
  if clock is None:
    return f"{cycles}; this TPU's clock is not known"
  return (
    f'{row["step_ms"]:.1f} ms estimated ({cycles} at {clock / 1e6:,.0f} MHz), '
    f'{row["images_per_second"]:,.0f} images/s, model FLOPs utilisation '
    f'{row["model_flops_utilisation"]:.1%}'
  )


def _waiting(row: dict[str, Any]) -> str:
  if row['step_ms'] is None:
    return ''
  return (
    f'; the step waits for {row["collective_ms_waited"]:.1f} ms of them as '
    f'compiled, and for {row["collective_ms_waited_at_best"]:.1f} ms if each '
    'array were sent as soon as it is computed'
  )


def _schedule_lines(plan: estimate.Plan, row: dict[str, Any]) -> list[str]:
  epoch = row['epoch_minutes']
  return [
    f'data         {row["decoded_per_second_and_host"]:,.0f} decoded images/s '
    f'per host ({plan.workload.decoded:g} per training image)',
    'schedule     '
    + ('' if epoch is None else f'{epoch:.2f} minutes per epoch, ')
    + f'{row["total_steps"]:,} steps in {row["total_hours"]:,.1f} hours, '
    f'{row["chip_hours"]:,.0f} chip-hours',
  ]


def _kind(plan: estimate.Plan, row: dict[str, Any]) -> str:
  """Describe how the estimate was made and what it leaves out."""
  parts = [
    "the sum of the compiler's cycles for each operation; nothing ran. Without "
    f'collectives, asynchronous copies and input. {_CALIBRATION}',
  ]
  if plan.effort == 'quick':
    parts.append('quick: memory as in training, cycles pessimistic')
  if row['unknown_loops']:
    parts.append(f'{row["unknown_loops"]} loops of unknown length count once')
  if row['not_estimated']:
    parts.append(
      f'the compiler has no cycles for {row["not_estimated"]} operations, '
      'which count as 0'
    )
  chip = plan.pod.generation.chip
  if chip != 'TPU v3':
    parts.append(f'no step was measured on {chip}')
  return '; '.join(parts)


def breakdown(schedule: costs.Schedule) -> str:
  """Format the cycles of each category, with bars."""
  longest = max((each.cycles for each in schedule.categories), default=1)
  lines = [f'{"M cycles":<36}{"forward":>9}{"backward":>9}{"share":>8}']
  for each in schedule.categories:
    bar = '#' * round(_BAR * each.cycles / longest)
    lines.append(
      f'{each.name:<36}{each.forward / 1e6:>9.2f}{each.backward / 1e6:>9.2f}'
      f'{each.cycles / schedule.cycles:>8.1%}  {bar}'.rstrip()
    )
  return '\n'.join(lines)


def size(number: float) -> str:
  """Format bytes: '2.22 GiB', or '33.1 MiB' below 1 GiB.

  Examples:
    >>> size(3 * 2**29), size(2**20)
    ('1.50 GiB', '1.0 MiB')
  """
  if number >= topology.GIB:
    return f'{number / topology.GIB:.2f} GiB'
  return f'{number / 2**20:.1f} MiB'


def flops(number: float) -> str:
  """Format operations: '42.2 TFLOP', or '281.9 GFLOP' below 1 TFLOP."""
  return (
    f'{number / 1e12:,.1f} TFLOP'
    if number >= 1e12
    else f'{number / 1e9:,.1f} GFLOP'
  )


def _yes(value: bool) -> str:
  return 'yes' if value else 'no'


_Cell = Callable[[dict[str, Any]], str]
# Row of the comparison -> function that formats its cell from a plan's numbers.
_SETTINGS: dict[str, _Cell] = {
  'image px': lambda row: f'{row["image_size"]}',
  'devices': lambda row: f'{row["devices"]} {row["device"]}s',
  'hosts': lambda row: f'{row["hosts"]}',
  'batch per device': lambda row: f'{row["batch_per_device"]}',
  'microbatches': lambda row: f'{row["accumulate"]}',
  'blocks recomputed': lambda row: _yes(row['remat']),
}
_RESULTS: dict[str, _Cell] = {
  'state': lambda row: size(row['state_bytes']),
  'state per device': lambda row: size(row['state_bytes_per_device']),
  'arguments': lambda row: size(row['argument_bytes']),
  'peak': lambda row: size(row['peak_bytes']),
  'available': lambda row: size(row['available_bytes']),
  'fits': lambda row: _yes(row['fits']),
  'largest batch': lambda row: f'{row["largest_batch_size"]:,}',
  'work per step': lambda row: flops(row['flops_per_step']),
  'M cycles per step': lambda row: f'{row["step_cycles"] / 1e6:,.1f}',
  'step ms': lambda row: f'{row["step_ms"]:.1f}',
  'images/s': lambda row: f'{row["images_per_second"]:,.0f}',
  'utilisation': lambda row: f'{row["model_flops_utilisation"]:.1%}',
  'collectives': lambda row: size(row['collective_bytes']),
  'collectives ms*': lambda row: f'{row["collective_ms_by_bandwidth"]:.1f}',
  'of it waited for*': lambda row: f'{row["collective_ms_waited"]:.1f}',
  'decoded/s per host': lambda row: (
    f'{row["decoded_per_second_and_host"]:,.0f}'
  ),
  'epoch minutes': lambda row: f'{row["epoch_minutes"]:.2f}',
  'schedule hours': lambda row: f'{row["total_hours"]:,.1f}',
  'chip-hours': lambda row: f'{row["chip_hours"]:,.0f}',
}


def comparison(plans: Sequence[estimate.Plan]) -> str:
  """Format plans in columns; '-' stands for unknown values."""
  rows = [plan.numbers() for plan in plans]
  width = max(14, *(len(plan.name) + 2 for plan in plans))
  lines = [f'{"":<18}' + ''.join(f'{plan.name:>{width}}' for plan in plans)]
  formats = {
    **_SETTINGS,
    **_fast_path_rows(plans[0].workload.fast_path_titles),
    **_RESULTS,
  }
  for title, read in formats.items():
    cells = [_cell(read, row) for row in rows]
    if set(cells) != {'-'}:
      lines.append(f'{title:<18}' + ''.join(f'{c:>{width}}' for c in cells))
  kinds = {_kind(plan, row) for plan, row in zip(plans, rows) if row['fits']}
  lines += ['', '* at the bandwidth of the links; not in the step time.']
  return '\n'.join(lines + sorted(f'Estimates: {kind}.' for kind in kinds))


def _fast_path_rows(titles: Mapping[str, str]) -> dict[str, _Cell]:
  def make(name: str) -> _Cell:
    return lambda row: _yes(row[name])

  return {title: make(name) for name, title in titles.items()}


def _cell(read: _Cell, row: dict[str, Any]) -> str:
  try:
    return read(row)
  except (KeyError, TypeError):  # Unknown, or the step does not fit.
    return '-'


def ranking(trials: Sequence[search.Trial]) -> str:
  """Format the trials of a search, in their order, and the first's flags."""
  titles = {
    'GiB': lambda row: f'{row["peak_bytes"] / topology.GIB:.2f}',
    'M cycles': lambda row: f'{row["step_cycles"] / 1e6:,.1f}',
    'step ms': lambda row: f'{row["step_ms"]:,.1f}',
    '+ waiting': lambda row: f'{row["collective_ms_waited"]:.1f}',
    'img/s/chip': lambda row: f'{_per_chip(row):,.0f}',
    'chip-hours': lambda row: f'{row["chip_hours"]:,.0f}',
  }
  lines = ['   ' + ''.join(f'{title:>12}' for title in titles) + '  settings']
  for place, trial in enumerate(trials, 1):
    row = trial.plan.numbers()
    cells = ''.join(f'{_cell(read, row):>12}' for read in titles.values())
    settings = f'{trial.plan.name}: {search.describe(trial.choice)}'
    lines.append(f'{place:>3}{cells}  {settings}')
  flags = ' '.join(
    f'--config.run.{name}={value}'
    for name, value in trials[0].choice.overrides().items()
  )
  return '\n'.join(
    [
      *lines,
      '',
      f'fastest      {flags}',
      'waiting      for collectives, at the bandwidth of the links, as the '
      'compiler has scheduled them; in images/s per chip, not in chip-hours',
      f'estimate     {_kind(trials[0].plan, trials[0].plan.numbers())}',
    ]
  )


def _per_chip(row: dict[str, Any]) -> float:
  seconds = (row['step_ms'] + row['collective_ms_waited']) / 1e3
  return row['batch_size'] / seconds / row['chips']
