"""Training in real processes: several as one run, stopped and killed."""

import os
import signal

import pytest

from nfnet_jax.experiments import train
from tests.end_to_end import linear, process_groups

LINEAR = 'tests.end_to_end.linear'
SLOWLY = '--seconds_per_step=0.3'
SECOND = 'process    1 of 2'  # The first line of its output.


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The metrics of an undisturbed run of one process on 8 devices."""
  folder = tmp_path_factory.mktemp('whole')
  process = process_groups.Process(LINEAR, f'--workdir={folder / "run"}')
  assert process.finish() == 0, process.output
  return process_groups.rows_of(folder / 'run')


def assert_same(rows, others):
  assert [row['step'] for row in rows] == [row['step'] for row in others]
  for row, other in zip(rows, others):
    assert row == pytest.approx(other, rel=1e-5, abs=1e-7)


def resume(workdir, *flags, count=2, devices=4):
  group = process_groups.ProcessGroup(
    LINEAR,
    f'--workdir={workdir}',
    *flags,
    count=count,
    devices=devices,
  )
  assert group.finish() == [0] * count, group.output
  return group


@pytest.mark.slow
def test_two_processes_are_one_run_and_log_once(whole, tmp_path):
  workdir = tmp_path / 'run'
  first, second = resume(workdir)
  assert_same(process_groups.rows_of(workdir), whole)
  assert process_groups.checkpoints_of(workdir) == [3, 6, 9, 12]
  assert 'evaluation at step 12' in first.output
  assert first.lines[0] == 'process    0 of 2'
  assert second.lines == [SECOND]


@pytest.mark.slow
def test_replicated_update_resumes_a_sharded_one(whole, tmp_path):
  workdir = tmp_path / 'run'
  group = process_groups.ProcessGroup(
    LINEAR, SLOWLY, f'--workdir={workdir}', '--sharded', count=2, devices=4
  )
  group[0].wait_for('step 4/')
  group[1].send(signal.SIGTERM)
  assert group.finish() == [75, 75], group.output
  assert len(process_groups.rows_of(workdir)) < len(whole)
  resume(workdir, count=4, devices=2)
  assert_same(process_groups.rows_of(workdir), whole)


@pytest.mark.slow
def test_sharded_update_is_equal_in_two_processes(whole, tmp_path):
  resume(tmp_path / 'run', '--sharded')
  assert_same(process_groups.rows_of(tmp_path / 'run'), whole)


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_at_one_step(whole, tmp_path):
  """They resume on another layout, where only process 0 sees the workdir."""
  group = process_groups.ProcessGroup(
    LINEAR,
    SLOWLY,
    f'--workdir={tmp_path / "run"}',
    count=2,
    devices=4,
  )
  group[0].wait_for('step 4/')
  group[1].send(signal.SIGTERM)
  assert group.finish() == [75, 75], group.output
  assert 'The same command resumes' in group[0].lines[-1]
  stopped = process_groups.checkpoints_of(tmp_path / 'run')[-1]
  assert 4 < stopped < linear.TOTAL
  other = tmp_path / 'elsewhere'
  process = process_groups.ProcessGroup(
    LINEAR,
    f'--workdir={other}',
    count=4,
    devices=2,
    of_0={'arguments': [f'--workdir={tmp_path / "run"}']},
  )
  assert process.finish() == [0] * 4, process.output
  assert f'Resuming after step {stopped}.' in process[0].output
  assert_same(process_groups.rows_of(tmp_path / 'run'), whole)
  assert not other.exists()


@pytest.mark.slow
def test_sigterm_during_evaluation(whole, tmp_path):
  group = process_groups.ProcessGroup(
    LINEAR,
    '--seconds_per_eval_batch=1',
    f'--workdir={tmp_path / "run"}',
    count=2,
    devices=4,
  )
  group[0].wait_for('Evaluating ...')
  group[0].send(signal.SIGTERM)
  assert group.finish() == [75, 75], group.output
  assert not [
    r for r in process_groups.rows_of(tmp_path / 'run') if 'eval/top1' in r
  ]
  assert process_groups.checkpoints_of(tmp_path / 'run')[-1] == 5
  resume(tmp_path / 'run')
  assert_same(process_groups.rows_of(tmp_path / 'run'), whole)


@pytest.mark.slow
@pytest.mark.parametrize('killed', [0, 1])
def test_killed_process_ends_the_others(whole, tmp_path, killed):
  group = process_groups.ProcessGroup(
    LINEAR,
    SLOWLY,
    '--peer_timeout=15',
    f'--workdir={tmp_path / "run"}',
    count=2,
    devices=4,
  )
  group[0].wait_for('step 5/')
  group[killed].send(signal.SIGKILL)
  codes = group.finish(60)
  assert codes[killed] == -signal.SIGKILL
  assert codes[1 - killed] in process_groups.LOST, group.output
  assert group[1 - killed].last_message, group.output
  assert process_groups.checkpoints_of(tmp_path / 'run')[-1] >= 3
  first, _ = resume(tmp_path / 'run')
  assert 'Resuming after step ' in first.output
  assert_same(process_groups.rows_of(tmp_path / 'run'), whole)


@pytest.mark.slow
@pytest.mark.parametrize('present', [0, 1])
def test_wait_for_an_absent_process_has_a_timeout(tmp_path, present):
  group = process_groups.ProcessGroup(
    LINEAR,
    '--peer_timeout=5',
    f'--workdir={tmp_path}',
    count=2,
    absent=[1 - present],
  )
  assert group.finish(fault=f'process {1 - present} absent') == [1]
  (line,) = group[0].lines
  assert 'The other processes did not start within 5 s.' in line


@pytest.mark.slow
@pytest.mark.parametrize('update', [[], ['--sharded']], ids=['', 'sharded'])
@pytest.mark.parametrize('bad', [0, 1])
def test_bad_data_in_one_process_loses_no_step(whole, tmp_path, bad, update):
  workdir = f'--workdir={tmp_path / "run"}'
  group = process_groups.ProcessGroup(
    LINEAR, *update, f'--fail={bad}:7', workdir, count=2, devices=4
  )
  fault = f'bad data in {bad}' + (', sharded update' if update else '')
  assert group.finish(fault=fault) == [2, 2], group.output
  for process in group:
    assert process.lines[-1] == 'nfnet_jax: the record is bad.'
  assert 'not finite' not in group.output
  assert process_groups.checkpoints_of(tmp_path / 'run') == [3, 5]
  first, _ = resume(tmp_path / 'run', *update)
  assert 'Resuming after step 5.' in first.output
  assert_same(process_groups.rows_of(tmp_path / 'run'), whole)


@pytest.mark.slow
@pytest.mark.parametrize('bad', [0, 1])
def test_bad_evaluation_data_in_one_process_loses_no_step(whole, tmp_path, bad):
  workdir = f'--workdir={tmp_path / "run"}'
  group = process_groups.ProcessGroup(
    LINEAR, f'--fail_eval={bad}', workdir, count=2, devices=4
  )
  fault = f'bad evaluation data in {bad}'
  assert group.finish(fault=fault) == [2, 2], group.output
  for process in group:
    assert process.lines[-1] == 'nfnet_jax: the record is bad.'
  assert process_groups.checkpoints_of(tmp_path / 'run') == [3, 5]
  first, _ = resume(tmp_path / 'run')
  assert 'Resuming after step 5.' in first.output
  assert_same(process_groups.rows_of(tmp_path / 'run'), whole)


@pytest.mark.slow
def test_bad_data_at_the_first_step_ends_all(tmp_path):
  group = process_groups.ProcessGroup(
    LINEAR, '--fail=1:0', f'--workdir={tmp_path}', count=2
  )
  fault = 'bad data in 1, at the first step'
  assert group.finish(fault=fault) == [2, 2], group.output
  for process in group:
    assert process.lines[-1] == 'nfnet_jax: the record is bad.'


@pytest.mark.slow
def test_full_disk_loses_no_saved_step(whole, tmp_path):
  """The limit allows the metrics but not the largest file of a checkpoint."""
  workdir = f'--workdir={tmp_path / "run"}'
  single = process_groups.Process(LINEAR, workdir, '--fail=0:7')
  assert single.finish() == 2  # Two steps early: batches are prefetched.
  assert process_groups.checkpoints_of(tmp_path / 'run') == [3, 5]
  group = process_groups.ProcessGroup(
    LINEAR, workdir, count=2, devices=4, of_0={'largest_file': 3100}
  )
  codes = group.finish(60)
  assert codes[0] == 1, group.output
  assert codes[1] in process_groups.LOST, group.output
  assert 'Resuming after step 5.' in group[0].lines
  end = 'the same command resumes from the last checkpoint.'
  (line,) = [line for line in group[0].lines if line.endswith(end)]
  assert str(tmp_path / 'run') in line
  assert process_groups.checkpoints_of(tmp_path / 'run') == [3, 5]
  resume(tmp_path / 'run')
  assert_same(process_groups.rows_of(tmp_path / 'run'), whole)


@pytest.mark.slow
def test_damaged_latest_checkpoint_is_skipped(whole, tmp_path):
  workdir = tmp_path / 'run'
  single = process_groups.Process(LINEAR, f'--workdir={workdir}', '--fail=0:7')
  assert single.finish() == 2
  for path in (workdir / 'checkpoints' / '5').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:-7])
  first, second = resume(workdir)
  assert 'Checkpoint 5 cannot be read' in first.output
  assert 'Resuming after step 3.' in first.lines
  assert second.lines == [SECOND]
  assert_same(process_groups.rows_of(workdir), whole)


def test_processes_with_other_flags_do_not_start(tmp_path):
  group = process_groups.ProcessGroup(
    LINEAR, f'--workdir={tmp_path}', count=2, of_1={'arguments': ['--seed=1']}
  )
  assert group.finish(fault='another flag in 1') == [2, 2], group.output
  line = 'Process 1 differs from process 0 in --seed (1 instead of 0).'
  assert all(line in process.lines[-1] for process in group), group.output


@pytest.mark.slow
@pytest.mark.parametrize('other', [0, 1])
def test_processes_with_other_packages_do_not_start(tmp_path, other):
  """One process has a package that the other lacks."""
  package = tmp_path / 'nvidia_other-1.0.dist-info'
  package.mkdir()
  (package / 'METADATA').write_text('Name: nvidia-other\nVersion: 1.0\n')
  paths = [str(tmp_path), *filter(None, [os.environ.get('PYTHONPATH')])]
  options = {'environment': {'PYTHONPATH': os.pathsep.join(paths)}}
  group = process_groups.ProcessGroup(
    LINEAR, f'--workdir={tmp_path}', count=2, **{f'of_{other}': options}
  )
  assert group.finish(fault=f'another package in {other}') == [2, 2], (
    group.output
  )
  versions = '1.0 instead of None' if other else 'None instead of 1.0'
  line = f'Process 1 differs from process 0 in nvidia-other ({versions}).'
  assert all(line in process.lines[-1] for process in group), group.output


@pytest.mark.slow
@pytest.mark.parametrize(
  ('module', 'options', 'line'),
  [
    (
      process_groups.TRAIN,
      {'environment': {'JAX_COMPILATION_CACHE_DIR': ''}},
      'JAX_COMPILATION_CACHE_DIR (none instead of a local folder)',
    ),
    (
      process_groups.TRAIN,
      {'arguments': ['--config.weights=w.npz']},
      'weights (w.npz instead of None)',
    ),
    (
      'nfnet_jax.experiments.evaluate',
      {'arguments': ['--weights=w.npz']},
      '--weights (given instead of not given)',
    ),
  ],
  ids=['cache', 'weights to begin with', 'weights to evaluate'],
)
def test_other_flags_or_variables_are_refused(
  small, tmp_path, module, options, line
):
  group = process_groups.ProcessGroup(
    module, *small, f'--workdir={tmp_path}', count=2, of_1=options
  )
  assert group.finish(90) == [2, 2], group.output
  assert all(line in process.lines[-1] for process in group), group.output


@pytest.fixture
def arguments(small):
  return [
    *small,
    '--config.train_for=40 steps',
    '--config.run.eval_every=15 steps',
    '--config.run.checkpoint_every=5 steps',
  ]


@pytest.mark.slow
def test_run_that_is_killed_and_stopped_resumes_to_the_same_metrics(
  arguments, tmp_path, run_command
):
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  code, _, err = run_command(train.main, *arguments, f'--workdir={whole}')
  assert code == 0, err

  def start():
    return process_groups.Process(
      process_groups.TRAIN, *arguments, f'--workdir={broken}'
    )

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
  assert process_groups.checkpoints_of(broken)[-1] >= 22

  third = start()
  assert third.finish() == 0, third.output
  assert process_groups.rows_of(broken) == process_groups.rows_of(whole)
