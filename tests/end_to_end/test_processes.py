"""Real processes: together, and killed for real."""

import signal
import socket

import jax
import pytest

from nfnet_jax.experiments import train
from tests.end_to_end import linear, pods

LINEAR = 'tests.end_to_end.linear'
SLOWLY = '--seconds_a_step=0.3'
SECOND = 'process    1 of 2'  # What it says first.


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The rows of a run that one process made undisturbed, on 8 devices."""
  folder = tmp_path_factory.mktemp('whole')
  process = pods.Process(LINEAR, f'--workdir={folder / "run"}')
  assert process.finish() == 0, process.said
  return pods.rows_of(folder / 'run')


def assert_same(rows, others):
  assert [row['step'] for row in rows] == [row['step'] for row in others]
  for row, other in zip(rows, others):
    assert row == pytest.approx(other, rel=1e-5, abs=1e-7)


def resume(workdir, *more, count=2, devices=4):
  pod = pods.Pod(
    LINEAR,
    f'--workdir={workdir}',
    *more,
    count=count,
    devices=devices,
  )
  assert pod.finish() == [0] * count, pod.said
  return pod


def test_two_processes_are_one_run_and_say_it_once(whole, tmp_path):
  workdir = tmp_path / 'run'
  first, second = resume(workdir)
  assert_same(pods.rows_of(workdir), whole)
  assert pods.checkpoints_of(workdir) == [3, 6, 9, 12]
  assert 'evaluation at step 12' in first.said
  assert first.lines[0] == 'process    0 of 2'
  assert second.lines == [SECOND]


def test_a_plain_update_goes_on_where_a_sharded_one_stopped(whole, tmp_path):
  workdir = tmp_path / 'run'
  pod = pods.Pod(
    LINEAR, SLOWLY, f'--workdir={workdir}', '--sharded', count=2, devices=4
  )
  pod[0].wait_for('step 4/')
  pod[1].send(signal.SIGTERM)
  assert pod.finish() == [75, 75], pod.said
  assert len(pods.rows_of(workdir)) < len(whole)
  resume(workdir, count=4, devices=2)
  assert_same(pods.rows_of(workdir), whole)


def test_a_sharded_update_is_the_same_in_two_processes(whole, tmp_path):
  resume(tmp_path / 'run', '--sharded')
  assert_same(pods.rows_of(tmp_path / 'run'), whole)


def test_sigterm_to_any_stops_all_at_one_step(whole, tmp_path):
  """And they resume on another layout, where process 0 alone has a disk."""
  pod = pods.Pod(
    LINEAR,
    SLOWLY,
    f'--workdir={tmp_path / "run"}',
    count=2,
    devices=4,
  )
  pod[0].wait_for('step 4/')
  pod[1].send(signal.SIGTERM)
  assert pod.finish() == [75, 75], pod.said
  assert 'The same command resumes' in pod[0].lines[-1]
  stopped = pods.checkpoints_of(tmp_path / 'run')[-1]
  assert 4 < stopped < linear.TOTAL
  other = tmp_path / 'elsewhere'
  process = pods.Pod(
    LINEAR,
    f'--workdir={other}',
    count=4,
    devices=2,
    of_0={'arguments': [f'--workdir={tmp_path / "run"}']},
  )
  assert process.finish() == [0] * 4, process.said
  assert f'Resuming after step {stopped}.' in process[0].said
  assert_same(pods.rows_of(tmp_path / 'run'), whole)
  assert not other.exists()


def test_sigterm_in_an_evaluation(whole, tmp_path):
  pod = pods.Pod(
    LINEAR,
    '--seconds_a_test=1',
    f'--workdir={tmp_path / "run"}',
    count=2,
    devices=4,
  )
  pod[0].wait_for('Testing ...')
  pod[0].send(signal.SIGTERM)
  assert pod.finish() == [75, 75], pod.said
  assert not [r for r in pods.rows_of(tmp_path / 'run') if 'eval/top1' in r]
  assert pods.checkpoints_of(tmp_path / 'run')[-1] == 5
  resume(tmp_path / 'run')
  assert_same(pods.rows_of(tmp_path / 'run'), whole)


@pytest.mark.parametrize('killed', [0, 1])
def test_a_killed_process_ends_the_others(whole, tmp_path, killed):
  pod = pods.Pod(
    LINEAR,
    SLOWLY,
    '--peer_timeout=15',
    f'--workdir={tmp_path / "run"}',
    count=2,
    devices=4,
  )
  pod[0].wait_for('step 5/')
  pod[killed].send(signal.SIGKILL)
  other = pod[1 - killed]
  assert other.finish(60) == 1
  assert other.last_word.endswith(' resumes from the last checkpoint.')
  assert pods.checkpoints_of(tmp_path / 'run')[-1] >= 3
  first, _ = resume(tmp_path / 'run')
  assert 'Resuming after step ' in first.said
  assert_same(pods.rows_of(tmp_path / 'run'), whole)


@pytest.mark.parametrize(
  'present', [pytest.param(0, marks=pytest.mark.slow), 1]
)
def test_an_absent_process_is_not_waited_for_for_ever(tmp_path, present):
  pod = pods.Pod(
    LINEAR,
    '--peer_timeout=5',
    f'--workdir={tmp_path}',
    count=2,
    absent=[1 - present],
  )
  assert pod.finish() == [1]
  (line,) = pod[0].lines
  assert line.startswith(
    f'nfnet_jax: Waited 5 s for process {present}: the others of 2 processes'
  )


@pytest.mark.parametrize('update', [[], ['--sharded']], ids=['', 'sharded'])
@pytest.mark.parametrize('bad', [0, 1])
def test_bad_data_in_one_process_loses_no_step(whole, tmp_path, bad, update):
  workdir = f'--workdir={tmp_path / "run"}'
  pod = pods.Pod(
    LINEAR, *update, f'--fail={bad}:7', workdir, count=2, devices=4
  )
  assert pod.finish(60) == [2, 2], pod.said
  assert pod[bad].lines[-1] == 'nfnet_jax: the record is bad.'
  others = f'nfnet_jax: Process {bad} ended all: the record is bad.'
  assert pod[1 - bad].lines[-1] == others
  assert 'not finite' not in pod.said
  assert pods.checkpoints_of(tmp_path / 'run') == [3, 5]
  first, _ = resume(tmp_path / 'run', *update)
  assert 'Resuming after step 5.' in first.said
  assert_same(pods.rows_of(tmp_path / 'run'), whole)


def test_bad_data_from_the_first_ends_all(tmp_path):
  pod = pods.Pod(LINEAR, '--fail=1:0', f'--workdir={tmp_path}', count=2)
  assert pod.finish(60) == [2, 2], pod.said
  assert pod[1].lines == [SECOND, 'nfnet_jax: the record is bad.']
  assert 'nfnet_jax: Process 1 ended all: the record is bad.' in pod[0].lines


def test_no_space_left_loses_no_saved_step(whole, tmp_path):
  """A checkpoint's largest file is larger than what metrics come to."""
  workdir = f'--workdir={tmp_path / "run"}'
  alone = pods.Process(LINEAR, workdir, '--fail=0:7')
  assert alone.finish() == 2  # Two steps early: batches are fetched ahead.
  assert pods.checkpoints_of(tmp_path / 'run') == [3, 5]
  pod = pods.Pod(
    LINEAR, workdir, count=2, devices=4, of_0={'largest_file': 3100}
  )
  assert pod.finish(60) == [1, 1]
  assert 'Resuming after step 5.' in pod[0].lines
  end = 'the same command resumes from the last checkpoint that is there.'
  (line,) = [line for line in pod[0].lines if line.endswith(end)]
  assert str(tmp_path / 'run') in line
  others = f'nfnet_jax: Process 0 ended all: {line[11:]}'
  assert pod[1].lines == [SECOND, others]
  assert pods.checkpoints_of(tmp_path / 'run') == [3, 5]
  resume(tmp_path / 'run')
  assert_same(pods.rows_of(tmp_path / 'run'), whole)


def test_a_damaged_latest_checkpoint_costs_that_one(whole, tmp_path):
  workdir = tmp_path / 'run'
  alone = pods.Process(LINEAR, f'--workdir={workdir}', '--fail=0:7')
  assert alone.finish() == 2
  for path in (workdir / 'checkpoints' / '5').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:-7])
  first, second = resume(workdir)
  assert 'Checkpoint 5 cannot be read' in first.said
  assert 'Resuming after step 3.' in first.lines
  assert second.lines == [SECOND]
  assert_same(pods.rows_of(workdir), whole)


def test_processes_that_differ_do_not_start(tmp_path):
  pod = pods.Pod(LINEAR, '--differs=1', f'--workdir={tmp_path}', count=2)
  assert pod.finish(60) == [2, 2]
  line = 'Process 1 differs from process 0 in seed (0 there, 1 here).'
  assert all(line in process.lines[-1] for process in pod)


@pytest.mark.parametrize('odd', [0, 1])
def test_hosts_with_other_versions_do_not_start(tmp_path, odd):
  pod = pods.Pod(LINEAR, f'--odd={odd}', f'--workdir={tmp_path}', count=2)
  assert pod.finish(60) == [2, 2], pod.said
  versions = jax.__version__, 'another'
  there, here = versions if odd else versions[::-1]
  line = f'differs from process 0 in jax ({there} there, {here} here).'
  assert all(line in process.lines[-1] for process in pod), pod.said


@pytest.mark.parametrize(
  ('door', 'odd', 'line'),
  [
    (
      pods.TRAIN,
      {'environment': {'JAX_COMPILATION_CACHE_DIR': ''}},
      'JAX_COMPILATION_CACHE_DIR (a local folder there, none here)',
    ),
    (
      pods.TRAIN,
      {'arguments': ['--config.weights=w.npz']},
      'weights (None there, w.npz here)',
    ),
    (
      'nfnet_jax.experiments.evaluate',
      {'arguments': ['--weights=w.npz']},
      '--weights (not given there, given here)',
    ),
  ],
  ids=['cache', 'weights to begin with', 'weights to evaluate'],
)
def test_what_would_part_hosts_ways_is_said(
  small, tmp_path, run_command, odd, line
):
  pod = pods.Pod(
    run_command, *small, f'--workdir={tmp_path}', count=2, of_1=odd
  )
  assert pod.finish(90) == [2, 2], pod.said
  assert all(line in process.lines[-1] for process in pod), pod.said


def test_a_port_that_is_taken_is_said(tmp_path):
  with socket.socket(socket.AF_INET6) as other:
    other.bind(('::', 0))
    other.listen()
    process = pods.Process(
      LINEAR,
      f'--coordinator=127.0.0.1:{other.getsockname()[1]}',
      '--num_processes=2',
      '--process_id=0',
      f'--workdir={tmp_path}',
    )
    assert process.finish() == 1, process.said
  (line,) = process.lines
  assert line.startswith('nfnet_jax: Process 0 cannot listen at port ')
  assert line.endswith('name another in --coordinator.')


@pytest.fixture
def arguments(small):
  return [
    *small,
    '--config.train_for=40 steps',
    '--config.run.eval_every=15 steps',
    '--config.run.checkpoint_every=5 steps',
  ]


def test_killed_stopped_and_resumed_is_the_same_run(
  arguments, tmp_path, run_command
):
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  code, _, err = run_command(train.main, *arguments, f'--workdir={whole}')
  assert code == 0, err

  def start():
    return pods.Process(pods.TRAIN, *arguments, f'--workdir={broken}')

  first = start()
  first.wait_for('step 12/')
  first.send(signal.SIGKILL)
  assert first.finish() == -signal.SIGKILL

  second = start()
  second.wait_for('Resuming after step ')
  (line,) = [line for line in second.lines if line.startswith('Resuming')]
  assert int(line.split()[-1].rstrip('.')) >= 5
  second.wait_for('step 22/')
  second.send(signal.SIGTERM)
  assert second.finish() == 75
  assert 'The same command resumes' in second.lines[-1]
  assert pods.checkpoints_of(broken)[-1] >= 22

  third = start()
  assert third.finish() == 0, third.said
  assert pods.rows_of(broken) == pods.rows_of(whole)
