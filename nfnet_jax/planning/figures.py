"""Plans as figures: cycles by category, and communication over the step."""

from __future__ import annotations

from collections.abc import Sequence
import itertools
import os
from typing import Any

from nfnet_jax import plotting
from nfnet_jax.planning import costs, estimate, overlap


def draw_cycles(
  plans: Sequence[estimate.Plan], path: str | os.PathLike
) -> None:
  """Write a bar chart of the cycles per category, with a colour per plan."""
  drawn = [
    (plan.name, {each.name: each for each in plan.schedule.categories})
    for plan in plans
    if plan.schedule
  ]
  names = list(dict.fromkeys(name for _, found in drawn for name in found))
  figure, axis = plotting.subplots(
    figsize=(9, 1 + 0.3 * len(names) * max(1, len(drawn) / 2)),
    layout='constrained',
  )
  nothing = costs.Category('', 0, 0)
  height = 0.8 / max(len(drawn), 1)
  for index, (label, categories) in enumerate(drawn):
    rows = [row + index * height for row in range(len(names))]
    passes = [
      [getattr(categories.get(n, nothing), each) / 1e6 for n in names]
      for each in ('forward', 'backward')
    ]
    colour = f'C{index}'
    axis.barh(rows, passes[0], height, color=colour, label=label)
    axis.barh(rows, passes[1], height, passes[0], color=colour, alpha=0.5)
  axis.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], names)
  axis.invert_yaxis()
  axis.set_xlabel('M cycles per step; forward dark, backward light')
  axis.grid(axis='x', alpha=0.3)
  if drawn:
    axis.legend()
  plotting.save(figure, path)


def draw_collectives(
  plans: Sequence[estimate.Plan], path: str | os.PathLike
) -> bool:
  """Draw what each plan's devices have computed and sent, over the step.

  Returns:
    False if there is nothing to draw: no plan fits on a TPU of known clock.
  """
  plans = [each for each in plans if each.overlap and each.pod.generation.clock]
  if not plans:
    return False
  figure, axes = plotting.subplots(
    len(plans),
    1,
    figsize=(8, 2.6 * len(plans)),
    layout='constrained',
    squeeze=False,
  )
  for axis, plan in zip(axes.flat, plans):
    _draw_collectives_of(plan, axis)
  axes.flat[0].legend(fontsize=8)
  axes.flat[-1].set_xlabel('ms since the start of the step')
  plotting.save(figure, path)
  return True


def _draw_collectives_of(plan: estimate.Plan, axis: Any) -> None:
  found, kind = plan.overlap, plan.pod.generation
  assert found
  assert kind.clock
  to_ms, rate = 1e3 / kind.clock, kind.clock / kind.links
  given = sorted(found.possible, key=lambda each: each.begin)
  axis.step(
    [each.begin * to_ms for each in given],
    list(itertools.accumulate(each.sent / 2**20 for each in given)),
    where='post',
    color='0.6',
    label='computed',
  )
  for label, transfers in (
    ('sent as compiled', found.scheduled),
    ('sent as soon as computed', found.possible),
  ):
    times, sizes, total = [0.0], [0.0], 0.0
    for each, begin, end in overlap.sending(transfers, rate):
      times += [begin * to_ms, end * to_ms]
      sizes += [total, total + each.sent / 2**20]
      total = sizes[-1]
    axis.plot(times, sizes, label=label)
  axis.axvline(found.cycles * to_ms, color='0.8', linewidth=1)
  axis.set(title=plan.name, ylabel='MiB')
  axis.set_xlim(left=0)
