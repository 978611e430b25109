"""Faults of processes in every phase of a run.

A run that goes through several faults ends like one without any.
"""

import functools
import pathlib
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from nfnet_jax.experiments import train
from nfnet_jax.training import checkpoint
from tests.end_to_end import linear, process_groups

pytestmark = pytest.mark.full

LINEAR = 'tests.end_to_end.linear'
# Seconds: the timeout of heartbeats, and the limit for exits after a fault.
PEER_TIMEOUT, BOUND = 12, 60
TWO, FOUR = {'count': 2, 'devices': 4}, {'count': 4, 'devices': 2}
LAYOUTS = TWO, FOUR, {'count': 2, 'devices': 1}, {'count': 1, 'devices': 8}

# Phase -> the line that process 0 logs in it, and flags that make it longer. A
# run goes through the phases in this order.
PHASES = {
  'starting': (None, []),
  'compiling': ('Compiling the training step', []),
  'training': ('  loss', []),
  'saving': ('Saving ...', ['--seconds_per_save=0.5']),
  'evaluating': ('Evaluating ...', ['--seconds_per_eval_batch=0.3']),
  'ending': (f'evaluation at step {linear.TOTAL}', []),
}
# A signal must arrive before the run is out of steps, on busy machines, too.
SLOWLY = '--seconds_per_step=0.5'


class Run:
  """A workdir, and the checkpoints that were seen in it."""

  def __init__(self, folder):
    self.workdir = folder / 'run'
    self._saved = set()

  def start(self, *arguments, **layout):
    return process_groups.ProcessGroup(
      LINEAR,
      f'--workdir={self.workdir}',
      f'--peer_timeout={PEER_TIMEOUT}',
      *arguments,
      **layout,
    )

  def finish(self, group, fault='', limit=BOUND):
    """Return the exit codes; check that no saved checkpoint is lost."""
    codes = group.finish(limit, fault)
    latest = max(self._saved, default=None)
    if latest is not None and 'step ' in group[0].output:
      assert f'Resuming after step {latest}.' in group[0].output, group.output
    saved = set(process_groups.checkpoints_of(self.workdir))
    assert self._saved <= saved, f'{self._saved - saved} lost:\n{group.output}'
    self._saved = saved
    return codes

  def complete(self, **layout):
    group = self.start(**layout)
    codes = self.finish(group, limit=process_groups.LIMIT)
    assert codes == [0] * len(group), group.output

  def results(self):
    abstract_state = linear.Experiment().abstract_state()
    folder = self.workdir / 'checkpoints'
    with checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
      state = checkpoints.restore(linear.TOTAL, abstract_state)
    return process_groups.rows_of(self.workdir), jax.tree.leaves(state)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """A function from a layout to the metrics and final state without faults."""

  @functools.cache
  def results(count, devices):
    run = Run(tmp_path_factory.mktemp('undisturbed'))
    run.complete(count=count, devices=devices)
    return run.results()

  return results


def assert_same_bits(run, reference):
  rows, state = run.results()
  assert rows == reference[0]
  for leaf, other in zip(state, reference[1], strict=True):
    np.testing.assert_array_equal(leaf, other)


def assert_close(run, reference):
  rows, state = run.results()
  assert len(rows) == len(reference[0])
  for row, other in zip(rows, reference[0]):
    assert row == pytest.approx(other, rel=1e-5, abs=1e-7)
  for leaf, other in zip(state, reference[1], strict=True):
    np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)


def assert_ended_well(group, codes, event, victim):
  """Check that exit codes and last messages agree on what happened."""
  context = f'{event!r} to process {victim} gave {codes}:\n{group.output}'
  if codes[victim] == -event:
    others = set(codes[:victim] + codes[victim + 1 :])
    if victim == 0:  # JAX may crash while it starts: see docs/failures.md.
      others.discard(-signal.SIGSEGV)
    # After the last barrier no process needs another.
    assert others <= process_groups.LOST or others == {0}, context
    for process, code in zip(group, codes):
      if code in process_groups.LOST:
        assert process.last_message, context
  else:  # The signal was handled, or came too late.
    assert set(codes) in ({75}, {0}), context
    if codes[0] == 75:
      assert 'The same command resumes' in group[0].lines[-1], context


def disturb(run, event, victim, phase, rng, layout):
  """Start processes and send a signal to one of them in a phase."""
  line, flags = PHASES[phase]
  group = run.start(SLOWLY, *flags, **layout)
  if line:
    group[0].wait_for(line)
  time.sleep(rng.uniform(0, 0.3 if line else 4))
  group[victim].send(event)
  fault = f'{event.name} to {victim}, {phase}'
  codes = run.finish(group, fault if layout == TWO else '')
  assert_ended_well(group, codes, event, victim)
  if event == signal.SIGTERM and phase not in ('starting', 'ending'):
    assert set(codes) == {75}, group.output


CELLS = [
  (TWO, signal.SIGTERM, 0, PHASES),
  (TWO, signal.SIGTERM, 1, PHASES),
  (TWO, signal.SIGKILL, 0, PHASES),
  (TWO, signal.SIGKILL, 1, PHASES),
  (FOUR, signal.SIGTERM, 3, ['training', 'saving', 'evaluating']),
  (FOUR, signal.SIGKILL, 0, ['compiling', 'saving', 'evaluating']),
  (FOUR, signal.SIGKILL, 2, ['training', 'saving', 'ending']),
]


def name_of(cell):
  layout, event, victim, _ = cell
  return f'{event.name}-to-{victim}-of-{layout["count"]}'


@pytest.mark.parametrize('cell', CELLS, ids=name_of)
def test_every_phase(undisturbed, tmp_path, cell):
  layout, event, victim, phases = cell
  run, rng = Run(tmp_path), np.random.default_rng(victim)
  for phase in phases:
    disturb(run, event, victim, phase, rng, layout)
  run.complete(**layout)
  assert_same_bits(run, undisturbed(**layout))


@pytest.mark.parametrize('seed', range(3))
def test_random_moment_process_and_layout(undisturbed, tmp_path, seed):
  run, rng = Run(tmp_path), np.random.default_rng(seed)
  for _ in range(4):
    layout = LAYOUTS[rng.integers(3)]
    event = rng.choice([signal.SIGTERM, signal.SIGKILL])
    victim = int(rng.integers(layout['count']))
    moment = rng.uniform(2, 9)
    print(
      f'seed {seed}: {event!r} to {victim} of {layout} after {moment:.2f} s'
    )
    group = run.start(SLOWLY, '--seconds_per_save=0.2', **layout)
    time.sleep(moment)
    group[victim].send(event)
    assert_ended_well(group, run.finish(group), event, victim)
  run.complete(**LAYOUTS[seed])
  assert_close(run, undisturbed(count=1, devices=8))


@pytest.mark.parametrize('stopped', [0, 1])
def test_process_without_heartbeat_ends_the_other(
  undisturbed, tmp_path, stopped
):
  """SIGSTOP acts like a host that hangs."""
  run = Run(tmp_path)
  group = run.start(SLOWLY, **TWO)
  group[0].wait_for('step 4/')
  group[stopped].send(signal.SIGSTOP)
  start = time.monotonic()
  other = group[1 - stopped]
  assert other.finish(BOUND) in process_groups.LOST, other.output
  seconds = time.monotonic() - start
  assert other.last_message
  group[stopped].send(signal.SIGKILL)
  codes = run.finish(group)
  group.report(f'SIGSTOP to {stopped}, then SIGKILL', codes, seconds)
  run.complete(**TWO)
  assert_same_bits(run, undisturbed(**TWO))


@pytest.mark.parametrize('absent', [[0], [1, 3]])
def test_wait_for_absent_processes_has_a_timeout(tmp_path, absent):
  group = Run(tmp_path).start(absent=absent, **FOUR)
  assert group.finish(BOUND) == [1] * len(group)
  for process in group:
    (line,) = process.lines
    assert f'did not start within {PEER_TIMEOUT} s.' in line


@pytest.mark.parametrize('late', [0, 1])
def test_late_process_joins(undisturbed, tmp_path, late):
  run = Run(tmp_path)
  group = run.start(**TWO, **{f'of_{late}': {'late': 6}})
  codes = run.finish(group, f'process {late} late', process_groups.LIMIT)
  assert codes == [0, 0], group.output
  assert_same_bits(run, undisturbed(**TWO))


@pytest.fixture(scope='module')
def half(tmp_path_factory):
  """A run that failed after checkpoints 3 and 5."""
  run = Run(tmp_path_factory.mktemp('half'))
  group = run.start('--fail=0:7', **TWO)
  assert run.finish(group) == [2, 2], group.output
  assert process_groups.checkpoints_of(run.workdir) == [3, 5]
  return run


def copy_of(run, folder):
  copy = Run(folder)
  shutil.copytree(run.workdir, copy.workdir)
  return copy


# The first is too small for any file, the second only for checkpoints.
@pytest.mark.parametrize('largest_file', [200, 3100])
@pytest.mark.parametrize('layout', [TWO, FOUR], ids=['2', '4'])
def test_full_disk(undisturbed, half, tmp_path, layout, largest_file):
  run = copy_of(half, tmp_path)
  group = run.start(of_0={'largest_file': largest_file}, **layout)
  fault = f'no space for files over {largest_file} bytes'
  first, *others = run.finish(group, fault if layout == TWO else '')
  assert first == 1, group.output
  assert set(others) <= process_groups.LOST, group.output
  assert 'Check the disk of' in group[0].last_message
  assert process_groups.checkpoints_of(run.workdir) == [3, 5]
  run.complete(**layout)
  assert_close(run, undisturbed(**TWO))


def truncate(path):
  path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path):
  contents = bytearray(path.read_bytes())
  contents[len(contents) // 2] ^= 1
  path.write_bytes(contents)


@pytest.mark.parametrize('damage', [truncate, flip_a_bit, pathlib.Path.unlink])
def test_damaged_checkpoint(undisturbed, half, tmp_path, damage):
  """Only the damaged checkpoint is skipped; with no other the run fails."""
  run, lost = (copy_of(half, tmp_path / name) for name in ('run', 'lost'))
  for folder, steps in (run, [5]), (lost, [3, 5]):
    for step in steps:
      checkpoint = folder.workdir / 'checkpoints' / str(step)
      for path in [p for p in checkpoint.rglob('*') if p.is_file()]:
        damage(path)
  group = lost.start(**TWO)
  fault = f'all checkpoints damaged: {damage.__name__}'
  assert lost.finish(group, fault) == [2, 2], group.output
  line = 'None of the checkpoints [3, 5]'
  assert all(line in process.lines[-1] for process in group), group.output
  group = run.start(**TWO)
  fault = f'latest checkpoint damaged: {damage.__name__}'
  codes = run.finish(group, fault, process_groups.LIMIT)
  assert codes == [0, 0], group.output
  assert 'Checkpoint 5 cannot be read' in group[0].output
  assert 'Resuming after step 3.' in group[0].lines
  assert_same_bits(run, undisturbed(**TWO))


def test_real_run_is_killed_at_random_moments(small, tmp_path, run_command):
  """Kill a single process with SIGKILL until the run is done."""
  arguments = [
    *small,
    '--config.train_for=80 steps',
    '--config.run.eval_every=20 steps',
    '--config.run.checkpoint_every=1 step',
  ]
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  code, _, err = run_command(train.main, *arguments, f'--workdir={whole}')
  assert code == 0, err
  rng = np.random.default_rng(0)
  reached = []
  newest = lambda: max(process_groups.checkpoints_of(broken), default=0)
  while True:
    process = process_groups.Process(
      process_groups.TRAIN,
      *arguments,
      f'--workdir={broken}',
    )
    if len(reached) < 8:
      process.wait_for('gains and biases')
      if len(reached) % 2:  # While it trains and saves, else at any time.
        process.wait_until(lambda: newest() not in reached, 'new checkpoint')
        time.sleep(rng.uniform(0, 0.3))
      else:
        time.sleep(rng.uniform(0, 10))
      process.send(signal.SIGKILL)
    code = process.finish()
    reached.append(newest())
    assert reached == sorted(reached), 'A saved step was lost.'
    if code == 0:
      break
    assert code == -signal.SIGKILL, process.output
  assert process_groups.rows_of(broken) == process_groups.rows_of(whole)
  assert len(set(reached)) > 3, reached
