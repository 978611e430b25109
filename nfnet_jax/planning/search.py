"""Search for the fastest way to compute a training step that fits.

Microbatches, recomputation and fast paths change the time and the memory of a
step, not its result. Each compilation takes minutes, so few are made:

1. Microbatches and recomputation add work. The smallest number of microbatches
   that fits is taken, and compared with recomputation if it is more than one.
   Only where it nearly fills the memory is twice the number tried: the compiler
   may recompute by itself in order to fit. A number is not compiled if it
   cannot fit: the temporary memory of n microbatches is at least an n-th of
   that of one.
2. With the fastest of these, each fast path is switched on or off alone, and
   then all together whose switch made the step faster.
3. The finalists are compiled again with full effort.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import dataclasses

from nfnet_jax import errors
from nfnet_jax.planning import estimate, planner

_MICROBATCHES = (1, 2, 4, 8, 16)
# The share of the memory from which a step nearly fills it.
_NEARLY_FULL = 0.85
# Steps that take up to this much longer than the fastest are finalists.
_MARGIN = 1.1
_MAX_FINALISTS = 3


@dataclasses.dataclass(frozen=True)
class Choice:
  """Settings that change the cost of a step but not its result.

  Attributes:
    accumulate: microbatches per step and device.
    remat: whether the backward pass recomputes the blocks.
    fast_paths: names of the fast paths in use, in the order of the settings.
  """

  accumulate: int
  remat: bool
  fast_paths: tuple[str, ...]

  def overrides(self) -> dict[str, int | bool | str]:
    """Return the settings of `run`."""
    paths = ','.join(self.fast_paths) or 'none'
    return {
      'accumulate': self.accumulate,
      'remat': self.remat,
      'fast_paths': paths,
    }

  def toggle(self, path: str, known: Iterable[str]) -> Choice:
    """Return the choice with one fast path switched on or off."""
    chosen = {*self.fast_paths} ^ {path}
    paths = tuple(each for each in known if each in chosen)
    return dataclasses.replace(self, fast_paths=paths)


@dataclasses.dataclass(frozen=True)
class Trial:
  """A choice and its plan."""

  choice: Choice
  plan: estimate.Plan

  @property
  def fits(self) -> bool:
    """Whether the step fits into memory."""
    return not self.plan.shortage

  @property
  def memory(self) -> int:
    """Bytes that the step needs per device."""
    return self.plan.numbers()['peak_bytes']

  @property
  def available(self) -> int:
    """Bytes that a device has."""
    return self.plan.pod.generation.memory_bytes

  @property
  def cost(self) -> float:
    """Milliseconds per image and chip, or cycles where the clock is unknown.

    It includes what the step waits for its collectives. It is infinite for a
    step that does not fit.
    """
    if not self.fits:
      return float('inf')
    row = self.plan.numbers()
    per_chip = row['batch_size'] / row['chips']
    if row['step_ms'] is None:
      return row['step_cycles'] / per_chip
    return (row['step_ms'] + row['collective_ms_waited']) / per_chip


class Search:
  """The search for one config, batch size and pod.

  Args:
    make: maps a choice to its planner, or raises `errors.InputError` if
      training would refuse it.
    paths: names of all fast paths.
    log_fn: logs a line for each trial.
  """

  def __init__(
    self,
    make: Callable[[Choice], planner.Planner],
    paths: Iterable[str],
    log_fn: Callable[[str], None],
  ):
    self._make = make
    self._paths = tuple(paths)
    self._log = log_fn
    self._trials: dict[tuple[Choice, str], Trial | None] = {}

  def run(self, start: Choice, full: bool) -> list[Trial]:
    """Return the trials that fit, the fastest first.

    Args:
      start: its fast paths are where the search begins.
      full: whether finalists are compiled with full effort. The other trials
        are then not in the result.
    """
    fitting = self._fitting(start)
    if not fitting:
      return []
    self._toggle(min(fitting, key=lambda trial: trial.cost))
    trials = _rank(self._trials.values())
    if not full:
      return trials
    close = [each for each in trials if each.cost < _MARGIN * trials[0].cost]
    return _rank(
      self._try(each.choice, 'full') for each in close[:_MAX_FINALISTS]
    )

  def _fitting(self, start: Choice) -> list[Trial]:
    """Return the steps that fit and may be fastest, without and with remat."""
    found: list[Trial] = []
    for remat in (False, True):
      trial = self._fewest(dataclasses.replace(start, remat=remat))
      if not trial:
        continue
      found.append(trial)
      if trial.memory > _NEARLY_FULL * trial.available:
        count = 2 * trial.choice.accumulate
        more = dataclasses.replace(trial.choice, accumulate=count)
        found += filter(None, [self._try(more, 'quick')])
      if trial.choice.accumulate == 1:
        break
    return found

  def _fewest(self, choice: Choice) -> Trial | None:
    """Return the trial with the fewest microbatches that fits."""
    whole = None
    for count in _MICROBATCHES:
      if whole and _least_memory(whole, count) > whole.available:
        continue
      trial = self._try(dataclasses.replace(choice, accumulate=count), 'quick')
      if trial and trial.fits:
        return trial
      if count == 1:
        whole = trial
    return None

  def _toggle(self, best: Trial) -> None:
    """Switch each fast path on or off, then all that made it faster."""
    gained = best.choice
    for path in self._paths:
      trial = self._try(best.choice.toggle(path, self._paths), 'quick')
      if trial and trial.cost < best.cost:
        gained = gained.toggle(path, self._paths)
    self._try(gained, 'quick')

  def _try(self, choice: Choice, effort: str) -> Trial | None:
    """Plan a choice, once; None if training would refuse it."""
    if (choice, effort) not in self._trials:
      try:
        made = self._make(choice)
      except errors.InputError:
        self._trials[choice, effort] = None
        return None
      trial = Trial(choice, made.attempt(effort))
      self._trials[choice, effort] = trial
      self._log(f'{describe(choice)}: {_result(trial)}')
    return self._trials[choice, effort]


def _rank(trials: Iterable[Trial | None]) -> list[Trial]:
  """Return the trials that fit, the fastest first."""
  fitting = [trial for trial in trials if trial and trial.fits]
  return sorted(fitting, key=lambda trial: trial.cost)


def describe(choice: Choice) -> str:
  """Return a choice in words."""
  parts = [f'{choice.accumulate} microbatch{"es" * (choice.accumulate > 1)}']
  if choice.remat:
    parts.append('blocks recomputed')
  parts.append(f'fast paths {", ".join(choice.fast_paths) or "none"}')
  return '; '.join(parts)


def _result(trial: Trial) -> str:
  row = trial.plan.numbers()
  if not row['fits']:
    return f'lacks {row["lacking_bytes"] / 2**30:.2f} GiB'
  return f'{row["step_cycles"] / 1e6:,.1f} M cycles ({row["effort"]})'


def _least_memory(whole: Trial, count: int) -> float:
  """Return the bytes that `count` microbatches need at least."""
  state = whole.plan.workload.state_bytes_per_device
  state = min(state, whole.memory)
  return state + (whole.memory - state) / count
