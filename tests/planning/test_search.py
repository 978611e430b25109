"""The search for the fastest step, with given memory and cycles."""

import dataclasses
import types

import pytest

from nfnet_jax import errors
from nfnet_jax.planning import costs, estimate, report, search
from tests.planning import plans

GIB = 2**30
# Cycles that a fast path adds, in millions.
GAINS = {'fast_stem': -10, 'fused_blocks': -20, 'fast_convs': 15}
START = search.Choice(1, False, ('fast_stem', 'fast_convs'))


class Steps:
  """Steps of given memory and cycles; notes what is compiled."""

  def __init__(self, whole=24, recomputed=6, microbatches=16):
    self.gib = {False: whole, True: recomputed}
    self.most = microbatches
    self.compiled = []

  def make(self, choice):
    if choice.accumulate > self.most:
      raise errors.InputError('batches are normalised')

    def attempt(effort):
      self.compiled.append((choice, effort))
      return self.plan(choice, effort)

    return types.SimpleNamespace(attempt=attempt)

  def plan(self, choice, effort):
    plan = plans.make(effort=effort)
    needed = 2 * GIB + self.gib[choice.remat] * GIB // choice.accumulate
    if needed > plan.pod.generation.memory_bytes:
      shortage = estimate.Shortage(needed, 0, [])
      return dataclasses.replace(
        plan, compiled=None, schedule=None, shortage=shortage
      )
    compiled = dataclasses.replace(
      plan.compiled,
      argument_bytes=needed,
      output_bytes=0,
      alias_bytes=0,
      temp_bytes=0,
      code_bytes=0,
    )
    millions = 100 + 5 * choice.accumulate + 30 * choice.remat
    if needed > 14 * GIB:  # The compiler recomputes.
      millions += 40
    millions += sum(GAINS[path] for path in choice.fast_paths)
    cycles = costs.Schedule(millions * 10**6, [], [], 0)
    return dataclasses.replace(plan, compiled=compiled, schedule=cycles)

  def search(self, full=False):
    return search.Search(self.make, GAINS, print).run(START, full)

  def settings(self, effort='quick'):
    return [
      (choice.accumulate, choice.remat, len(choice.fast_paths))
      for choice, made in self.compiled
      if made == effort
    ]


def test_a_step_that_fits_is_not_cut(capsys):
  steps = Steps(whole=10)
  best, *_ = steps.search()
  assert best.choice == search.Choice(1, False, ('fast_stem', 'fused_blocks'))
  # The start, each path put on or off, and what gained together.
  assert steps.settings() == [(1, False, n) for n in (2, 1, 3, 1, 2)]
  first, *_ = capsys.readouterr().out.splitlines()
  assert first == (
    '1 microbatch; fast paths fast_stem, fast_convs: 110.0 M cycles (quick)'
  )


def test_fewest_microbatches_and_recomputation_are_compared(capsys):
  steps = Steps(whole=24)
  best, *_ = steps.search()
  assert (best.choice.accumulate, best.choice.remat) == (2, False)
  tried = [step[:2] for step in steps.settings()[:4]]
  assert tried == [(1, False), (2, False), (4, False), (1, True)]
  assert 'fast_convs: lacks 10.52 GiB' in capsys.readouterr().out


def test_more_microbatches_are_tried_where_the_memory_is_nearly_full():
  steps = Steps(whole=13)
  best, *_ = steps.search()
  assert (best.choice.accumulate, best.choice.remat) == (2, False)
  assert steps.settings()[:2] == [(1, False, 2), (2, False, 2)]


def test_what_cannot_fit_is_not_compiled():
  steps = Steps(whole=88, recomputed=40)
  steps.search()
  # Two microbatches would need at least 45.4 GiB of 15.48, four 23.1.
  cut = [step[:2] for step in steps.settings()[:4]]
  assert cut == [(1, False), (8, False), (1, True), (4, True)]


def test_what_training_refuses_is_not_tried():
  best, *_ = Steps(microbatches=1).search()
  assert (best.choice.accumulate, best.choice.remat) == (1, True)


def test_nothing_fits():
  assert not Steps(whole=500, recomputed=500).search()


def test_finalists_are_compiled_with_full_effort():
  steps = Steps(whole=10)
  trials = steps.search(full=True)
  assert {trial.plan.effort for trial in trials} == {'full'}
  # 75 M cycles, and what takes up to 1.1 times as long; here nothing does.
  assert steps.settings('full') == [(1, False, 2)]
  assert trials[0].choice.fast_paths == ('fast_stem', 'fused_blocks')


@pytest.mark.parametrize('pod', ['v3:8x8', 'v6e:8x16'])
def test_ranking(pod):
  """Without a known clock, cycles decide."""
  steps = Steps(whole=10)
  make = plans.make
  trials = [
    dataclasses.replace(
      trial,
      plan=dataclasses.replace(trial.plan, pod=make(pod, 128, 32).pod),
    )
    for trial in steps.search()
  ]
  assert sorted(trials, key=lambda trial: trial.cost) == trials
  text = report.ranking(trials)
  _, first, *_ = text.splitlines()
  assert first.split()[:3] == ['1', '12.00', '75.0']
  assert first.endswith('1 microbatch; fast paths fast_stem, fused_blocks')
  assert (
    'fastest      --config.run.accumulate=1 --config.run.remat=False '
    '--config.run.fast_paths=fast_stem,fused_blocks\n'
  ) in text
  if pod.startswith('v6e'):
    assert first.split()[3:7] == ['-'] * 4
