"""Plans as text and pictures: a summary, side by side, where cycles go."""

from collections.abc import Callable, Sequence
import os
from typing import Any

from nfnet_jax import plotting
from nfnet_jax.planning import estimate, topology
from nfnet_jax.training import forms

# What estimates were worth; see experiments/plan_calibration/.
_CALIBRATION = (
  'Measured steps of F0 to F3 on TPU v3 took 1.22 to 1.32 times as long as '
  'estimated of the plain form'
)
_BAR = 24


def summary(plan: estimate.Plan) -> str:
  """Says everything about one plan, a line a subject."""
  row, work = plan.numbers(), plan.workload
  lines = [
    f'plan         {work.config}: {work.model} at {work.image_size} px, '
    f'{work.dtype}',
    f'pod          {plan.pod.name}: {_pod(row)}',
    f'batch        {work.batch:,}: {_batch(row)}',
    f'form         {", ".join(forms.names(row)) or "plain"}',
    f'state        {_state(row)}',
    f'memory       {_memory(row)}',
  ]
  if not plan.compiled:
    return '\n'.join(lines)
  lines += [
    f'work         {flops(row["flops_per_step"])} a step, by the model '
    f'{flops(row["model_flops_per_step"])}',
    f'step         {_step(row)}',
    f'collectives  {size(row["collective_bytes"])} a step, '
    f'{row["collective_ms_by_bandwidth"]:.1f} ms or more by the bandwidth of '
    'the links: not in the step, and not from the compiler',
  ]
  if row['step_ms'] is not None:
    lines += _schedule_lines(plan, row)
  lines += [f'estimate     {_kind(plan, row)}', '', breakdown(plan)]
  return '\n'.join(lines)


def _pod(row: dict[str, Any]) -> str:
  kind = topology.parse(row['topology'])
  hosts = f'{row["hosts"]} host{"s" if row["hosts"] > 1 else ""}'
  if row['device'] == 'chip':
    return f'{row["chips"]} chips {kind.chip}, {hosts}'
  return f'{row["devices"]} cores of {row["chips"]} chips {kind.chip}, {hosts}'


def _batch(row: dict[str, Any]) -> str:
  each = f'{row["batch_per_device"]} a {row["device"]}'
  return ', '.join([each, *forms.savings(row)])


def _state(row: dict[str, Any]) -> str:
  whole, parameters = size(row['state_bytes']), size(row['parameter_bytes'])
  if not row['shard_update']:
    return f'{whole} a {row["device"]}, of it parameters {parameters}'
  kept = size(row['state_bytes_per_device'])
  return (
    f'{whole} in all, of it parameters {parameters}; {kept} a {row["device"]}'
  )


def _memory(row: dict[str, Any]) -> str:
  peak, available = row['peak_bytes'], row['available_bytes']
  if row['fits']:
    return (
      f'{size(peak)} of {size(available)} a {row["device"]}: '
      f'{size(available - peak)} to spare; arguments '
      f'{size(row["argument_bytes"])}, temporary {size(row["temp_bytes"])}'
    )
  return (
    f'{size(peak)} needed, {size(available)} there a {row["device"]}: does '
    f'not fit by {size(row["lacking_bytes"])}\n'
    f'largest      {_largest(row)}'
  )


def _largest(row: dict[str, Any]) -> str:
  largest, device = row['largest_batch_per_device'], row['device']
  tried = ', '.join(str(batch) for batch in row['tried_batch_per_device'])
  if not largest:
    return f'not even 1 a {device} fits (compiled: {tried})'
  flags = f'--config.batch_size={row["largest_batch_size"]}'
  if row['largest_batch_shards']:
    flags += f' --config.data.shards={row["largest_batch_shards"]}'
  return f'{largest} a {device} fit: {flags} (compiled: {tried})'


def _step(row: dict[str, Any]) -> str:
  cycles = f'{row["step_cycles"] / 1e6:,.2f} M cycles'
  if row['step_ms'] is None:
    return f"{cycles}; this TPU's clock is not known"
  clock = topology.parse(row['topology']).clock
  return (
    f'{row["step_ms"]:.1f} ms estimated ({cycles} at {clock / 1e6:,.0f} MHz), '
    f'{row["images_per_second"]:,.0f} images/s, model FLOPs utilisation '
    f'{row["model_flops_utilisation"]:.1%}'
  )


def _schedule_lines(plan: estimate.Plan, row: dict[str, Any]) -> list[str]:
  epoch = row['epoch_minutes']
  return [
    f'data         {row["decoded_per_second_and_host"]:,.0f} decoded images/s '
    f'a host ({plan.workload.decoded} for each one delivered)',
    'schedule     '
    + ('' if epoch is None else f'{epoch:.2f} minutes an epoch, ')
    + f'{row["total_steps"]:,} steps in {row["total_hours"]:,.1f} hours, '
    f'{row["chip_hours"]:,.0f} chip-hours',
  ]


def _kind(plan: estimate.Plan, row: dict[str, Any]) -> str:
  """Says what kind of estimate it is."""
  parts = [
    "the sum of the compiler's cycles for each operation; nothing ran. No "
    f'collectives, asynchronous copies or input. {_CALIBRATION}',
  ]
  if plan.effort == 'quick':
    parts.append('quick: memory as in training, cycles pessimistic')
  if row['unknown_loops']:
    parts.append(f'{row["unknown_loops"]} loops of unknown length count once')
  if plan.pod.generation.chip != 'TPU v3':
    parts.append('on other TPUs nothing was compared')
  return '; '.join(parts)


def breakdown(plan: estimate.Plan) -> str:
  """Formats where the cycles go, with bars."""
  total = plan.schedule.cycles
  most = max((part.cycles for part in plan.schedule.parts), default=1)
  lines = [f'{"M cycles":<36}{"forward":>9}{"backward":>9}{"share":>8}']
  for part in plan.schedule.parts:
    bar = '#' * round(_BAR * part.cycles / most)
    lines.append(
      f'{part.name:<36}{part.forward / 1e6:>9.2f}{part.backward / 1e6:>9.2f}'
      f'{part.cycles / total:>8.1%}  {bar}'.rstrip()
    )
  return '\n'.join(lines)


def size(number: float) -> str:
  """Formats bytes: '2.22 GiB', or '33.1 MiB' if it is less than one.

  Example:
    >>> size(3 * 2**29), size(2**20)
    ('1.50 GiB', '1.0 MiB')
  """
  if number >= topology.GIB:
    return f'{number / topology.GIB:.2f} GiB'
  return f'{number / 2**20:.1f} MiB'


def flops(number: float) -> str:
  """Formats operations: '42.2 TFLOP', or '281.9 GFLOP' if it is less."""
  return (
    f'{number / 1e12:,.1f} TFLOP'
    if number >= 1e12
    else f'{number / 1e9:,.1f} GFLOP'
  )


def _yes(value: bool) -> str:
  return 'yes' if value else 'no'


# Row of the comparison -> how it is read from a plan's numbers.
_ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
  'image px': lambda row: f'{row["image_size"]}',
  'devices': lambda row: f'{row["devices"]} {row["device"]}s',
  'hosts': lambda row: f'{row["hosts"]}',
  'batch a device': lambda row: f'{row["batch_per_device"]}',
  'in parts': lambda row: f'{row["accumulate"]}',
  'blocks again': lambda row: _yes(row['remat']),
  **{
    name: lambda row, form=form: _yes(row[form])
    for form, name in forms.NAMES.items()
  },
  'state': lambda row: size(row['state_bytes']),
  'state a device': lambda row: size(row['state_bytes_per_device']),
  'arguments': lambda row: size(row['argument_bytes']),
  'peak': lambda row: size(row['peak_bytes']),
  'available': lambda row: size(row['available_bytes']),
  'fits': lambda row: _yes(row['fits']),
  'largest batch': lambda row: f'{row["largest_batch_size"]:,}',
  'work a step': lambda row: flops(row['flops_per_step']),
  'M cycles a step': lambda row: f'{row["step_cycles"] / 1e6:,.1f}',
  'step ms': lambda row: f'{row["step_ms"]:.1f}',
  'images/s': lambda row: f'{row["images_per_second"]:,.0f}',
  'utilisation': lambda row: f'{row["model_flops_utilisation"]:.1%}',
  'collectives': lambda row: size(row['collective_bytes']),
  'collectives ms*': lambda row: f'{row["collective_ms_by_bandwidth"]:.1f}',
  'decoded/s a host': lambda row: f'{row["decoded_per_second_and_host"]:,.0f}',
  'epoch minutes': lambda row: f'{row["epoch_minutes"]:.2f}',
  'schedule hours': lambda row: f'{row["total_hours"]:,.1f}',
  'chip-hours': lambda row: f'{row["chip_hours"]:,.0f}',
}


def comparison(plans: Sequence[estimate.Plan]) -> str:
  """Formats plans side by side; '-' stands for what is not known."""
  rows = [plan.numbers() for plan in plans]
  width = max(14, *(len(plan.name) + 2 for plan in plans))
  lines = [f'{"":<18}' + ''.join(f'{plan.name:>{width}}' for plan in plans)]
  for title, read in _ROWS.items():
    cells = [_cell(read, row) for row in rows]
    if set(cells) != {'-'}:
      lines.append(f'{title:<18}' + ''.join(f'{c:>{width}}' for c in cells))
  kinds = {_kind(plan, row) for plan, row in zip(plans, rows) if row['fits']}
  lines += ['', '* by the bandwidth of the links; not in the step.']
  return '\n'.join(lines + sorted(f'Estimates: {kind}.' for kind in kinds))


def _cell(read: Callable, row: dict[str, Any]) -> str:
  try:
    return read(row)
  except (KeyError, TypeError):  # Not known, or does not fit.
    return '-'


def draw(plans: Sequence[estimate.Plan], path: str | os.PathLike) -> None:
  """Writes a bar chart of where the cycles go, plans side by side."""
  plans = [plan for plan in plans if plan.schedule]
  names = list(
    dict.fromkeys(p.name for plan in plans for p in plan.schedule.parts)
  )
  figure, axis = plotting.subplots(
    figsize=(9, 1 + 0.3 * len(names) * max(1, len(plans) / 2)),
    layout='constrained',
  )
  height = 0.8 / max(len(plans), 1)
  for index, plan in enumerate(plans):
    parts = {part.name: part for part in plan.schedule.parts}
    rows = [row + index * height for row in range(len(names))]
    passes = [
      [getattr(parts[n], each) / 1e6 if n in parts else 0 for n in names]
      for each in ('forward', 'backward')
    ]
    colour = f'C{index}'
    axis.barh(rows, passes[0], height, color=colour, label=plan.name)
    axis.barh(rows, passes[1], height, passes[0], color=colour, alpha=0.5)
  axis.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], names)
  axis.invert_yaxis()
  axis.set_xlabel('M cycles a step; forward dark, backward light')
  axis.grid(axis='x', alpha=0.3)
  if plans:
    axis.legend()
  plotting.save(figure, path)
