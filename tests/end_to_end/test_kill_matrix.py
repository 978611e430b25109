"""What may befall processes, to which of them, in which phase of a run.

A run meets one mishap after another, and must end as if undisturbed.
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
from tests.end_to_end import linear, pods

pytestmark = pytest.mark.slow

LINEAR = 'tests.end_to_end.linear'
# Seconds after which a silent process is lost, and all may take to end; those
# that end linger, and imports on a busy machine hold up signs of life.
SILENCE, BOUND = 12, 60
TWO, FOUR = {'count': 2, 'devices': 4}, {'count': 4, 'devices': 2}
LAYOUTS = TWO, FOUR, {'count': 2, 'devices': 1}, {'count': 1, 'devices': 8}

# Phase -> what process 0 says in it, and what makes it long enough to hit. In
# this order a run comes through all of them.
PHASES = {
  'starting': (None, []),
  'compiling': ('Compiling the training step', []),
  'training': ('  loss', []),
  'saving': ('Saving ...', ['--seconds_a_save=0.5']),
  'evaluating': ('Testing ...', ['--seconds_a_test=0.3']),
  'ending': (f'evaluation at step {linear.TOTAL}', []),
}
SLOWLY = '--seconds_a_step=0.2'


class Run:
  """A workdir, and what has been seen of it."""

  def __init__(self, folder):
    self.workdir = folder / 'run'
    self._saved = set()

  def start(self, *arguments, **layout):
    return pods.Pod(
      LINEAR,
      f'--workdir={self.workdir}',
      f'--peer_timeout={SILENCE}',
      *arguments,
      **layout,
    )

  def finish(self, pod):
    """Returns the exit codes, once what was saved is seen to stand."""
    codes = pod.finish(BOUND)
    latest = max(self._saved, default=None)
    if latest is not None and 'step ' in pod[0].said:
      assert f'Resuming after step {latest}.' in pod[0].said, pod.said
    saved = set(pods.checkpoints_of(self.workdir))
    assert self._saved <= saved, f'{self._saved - saved} lost:\n{pod.said}'
    self._saved = saved
    return codes

  def complete(self, **layout):
    pod = self.start(**layout)
    assert self.finish(pod) == [0] * len(pod), pod.said

  def results(self):
    like = linear.Experiment().abstract_state()
    folder = self.workdir / 'checkpoints'
    with checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
      state = checkpoints.restore(linear.TOTAL, like)
    return pods.rows_of(self.workdir), jax.tree.leaves(state)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """Layout -> rows and final state of a run to which nothing happened."""

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


def assert_ended_well(pod, codes, event, victim):
  """Checks exit codes and last words; all agree on what happened."""
  said = f'{event!r} to process {victim} gave {codes}:\n{pod.said}'
  if codes[victim] == -event:
    others = set(codes[:victim] + codes[victim + 1 :])
    # After the last barrier a process misses nobody.
    assert others in ({1}, {0}), said
    for process, code in zip(pod, codes):
      if code == 1:
        assert process.last_word, said
  else:  # Noted, or too late.
    assert set(codes) in ({75}, {0}), said
    if codes[0] == 75:
      assert 'The same command resumes' in pod[0].lines[-1], said


def disturb(run, event, victim, phase, rng, layout):
  """Starts processes, and does something to one in a phase."""
  cue, slowly = PHASES[phase]
  pod = run.start(SLOWLY, *slowly, **layout)
  if cue:
    pod[0].wait_for(cue)
  time.sleep(rng.uniform(0, 0.3 if cue else 4))
  pod[victim].send(event)
  codes = run.finish(pod)
  assert_ended_well(pod, codes, event, victim)
  if event == signal.SIGTERM and phase not in ('starting', 'ending'):
    assert set(codes) == {75}, pod.said


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
def test_any_moment_of_any_process_on_any_layout(undisturbed, tmp_path, seed):
  run, rng = Run(tmp_path), np.random.default_rng(seed)
  for _ in range(4):
    layout = LAYOUTS[rng.integers(3)]
    event = rng.choice([signal.SIGTERM, signal.SIGKILL])
    victim = int(rng.integers(layout['count']))
    moment = rng.uniform(2, 9)
    print(
      f'seed {seed}: {event!r} to {victim} of {layout} after {moment:.2f} s'
    )
    pod = run.start(SLOWLY, '--seconds_a_save=0.2', **layout)
    time.sleep(moment)
    pod[victim].send(event)
    assert_ended_well(pod, run.finish(pod), event, victim)
  run.complete(**LAYOUTS[seed])
  assert_close(run, undisturbed(count=1, devices=8))


@pytest.mark.parametrize('stopped', [0, 2])
def test_a_silent_process_ends_the_others(undisturbed, tmp_path, stopped):
  """As one whose host hangs."""
  run = Run(tmp_path)
  pod = run.start(SLOWLY, **FOUR)
  pod[0].wait_for('step 4/')
  pod[stopped].send(signal.SIGSTOP)
  others = [process for index, process in enumerate(pod) if index != stopped]
  for process in others:
    assert process.finish(BOUND) == 1, process.said
    assert process.last_word
  pod[stopped].send(signal.SIGKILL)
  run.finish(pod)
  run.complete(**FOUR)
  assert_same_bits(run, undisturbed(**FOUR))


@pytest.mark.parametrize('absent', [[0], [1, 3]])
def test_absent_processes_are_not_waited_for_for_ever(tmp_path, absent):
  pod = Run(tmp_path).start(absent=absent, **FOUR)
  assert pod.finish(BOUND) == [1] * len(pod)
  for process in pod:
    (line,) = process.lines
    assert f'Waited {SILENCE} s for process ' in line


@pytest.mark.parametrize('late', [0, 1])
def test_a_late_process_is_waited_for(undisturbed, tmp_path, late):
  run = Run(tmp_path)
  pod = run.start(**TWO, **{f'of_{late}': {'late': 6}})
  assert run.finish(pod) == [0, 0], pod.said
  assert_same_bits(run, undisturbed(**TWO))


@pytest.fixture(scope='module')
def half(tmp_path_factory):
  """A run that left checkpoints 3 and 5."""
  run = Run(tmp_path_factory.mktemp('half'))
  pod = run.start('--fail=0:7', **TWO)
  assert run.finish(pod) == [2, 2], pod.said
  assert pods.checkpoints_of(run.workdir) == [3, 5]
  return run


def copy_of(run, folder):
  copy = Run(folder)
  shutil.copytree(run.workdir, copy.workdir)
  return copy


# The first suffices for no file, the second for metrics, not for checkpoints.
@pytest.mark.parametrize('largest_file', [200, 3100])
@pytest.mark.parametrize('layout', [TWO, FOUR], ids=['2', '4'])
def test_no_space_left(undisturbed, half, tmp_path, layout, largest_file):
  run = copy_of(half, tmp_path)
  pod = run.start(of_0={'largest_file': largest_file}, **layout)
  assert run.finish(pod) == [1] * len(pod), pod.said
  assert 'See to the disk of' in pod.said
  for process in pod[1:]:
    assert process.lines[-1].startswith('nfnet_jax: Process 0 ended all: ')
  assert pods.checkpoints_of(run.workdir) == [3, 5]
  run.complete(**layout)
  assert_close(run, undisturbed(**TWO))


def truncate(path):
  path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path):
  contents = bytearray(path.read_bytes())
  contents[len(contents) // 2] ^= 1
  path.write_bytes(contents)


@pytest.mark.parametrize('damage', [truncate, flip_a_bit, pathlib.Path.unlink])
def test_a_damaged_checkpoint(undisturbed, half, tmp_path, damage):
  """Costs itself and no other; without any there is nothing to resume."""
  run, lost = (copy_of(half, tmp_path / name) for name in ('run', 'lost'))
  for folder, steps in (run, [5]), (lost, [3, 5]):
    for step in steps:
      checkpoint = folder.workdir / 'checkpoints' / str(step)
      for path in [p for p in checkpoint.rglob('*') if p.is_file()]:
        damage(path)
  pod = lost.start(**TWO)
  assert lost.finish(pod) == [2, 2], pod.said
  line = 'None of the checkpoints [3, 5]'
  assert all(line in process.lines[-1] for process in pod), pod.said
  pod = run.start(**TWO)
  assert run.finish(pod) == [0, 0], pod.said
  assert 'Checkpoint 5 cannot be read' in pod[0].said
  assert 'Resuming after step 3.' in pod[0].lines
  assert_same_bits(run, undisturbed(**TWO))


def test_any_moment_of_the_real_run(small, tmp_path, run_command):
  """`kill -9` of a process alone, until the run is done."""
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
  while True:
    process = pods.Process(
      pods.TRAIN,
      *arguments,
      f'--workdir={broken}',
    )
    if len(reached) < 8:
      process.wait_for('gains and biases')
      # From before the first step to well into saving.
      time.sleep(rng.uniform(0, 10))
      process.send(signal.SIGKILL)
    code = process.finish()
    reached.append(max(pods.checkpoints_of(broken), default=0))
    assert reached == sorted(reached), 'A saved step was lost.'
    if code == 0:
      break
    assert code == -signal.SIGKILL, process.said
  assert pods.rows_of(broken) == pods.rows_of(whole)
  assert len(set(reached)) > 3, reached
