"""The command `train`, run in this process through the real loop."""

import json
import re
import shutil
import signal
import types

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from nfnet_jax.config import experiment as experiment_lib
from nfnet_jax.config import steps
from nfnet_jax.config import workdir as workdir_lib
from nfnet_jax.data import faults, pipeline
from nfnet_jax.experiments import evaluate, train
from nfnet_jax.training import checkpoint, loop, metrics, profiling


def rows_of(workdir):
  return metrics.read_metrics(workdir / 'metrics.jsonl')


def state_of(workdir, step):
  config = workdir_lib.load(workdir)
  template = steps.open_experiment(config).abstract_state()
  with checkpoint.Checkpoints(workdir / 'checkpoints') as checkpoints:
    return checkpoints.restore(step, template)


def tags_of(workdir):
  """Return the names and steps of what TensorBoard shows."""
  (path,) = (workdir / 'tensorboard').iterdir()
  content, tags = path.read_bytes(), set()
  while content:
    size = int.from_bytes(content[:8], 'little')
    event = event_pb2.Event.FromString(content[12 : 12 + size])
    tags |= {(value.tag, event.step) for value in event.summary.value}
    content = content[16 + size :]
  return tags


def fail_at(monkeypatch, step, error):
  """Let the data stream fail in place of a step's batch."""
  stream = pipeline.train_batches

  def failing(*arguments):
    for batch in stream(*arguments):
      if batch['step'] == step:
        raise error
      yield batch

  monkeypatch.setattr(pipeline, 'train_batches', failing)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """What `trained` returns, empty until a test has asked for it."""
  return types.SimpleNamespace(workdir=tmp_path_factory.mktemp('run'))


@pytest.fixture
def trained(run_command, small, made, monkeypatch):
  """A finished and traced run, made once.

  Its `workdir`, the command's `out` and `err`, the names of the functions that
  were `compiled`, in order, and the name of those `mapped` over devices.
  """
  if not hasattr(made, 'err'):
    made.compiled = []

    def record(event, duration, **details):
      del duration
      if event == '/jax/core/compile/backend_compile_duration':
        made.compiled.append(details.get('fun_name', ''))

    # The loop transfers by name only.
    guarded = jax.transfer_guard('disallow')(loop.Loop.run)
    monkeypatch.setattr(loop.Loop, 'run', guarded)
    jax.monitoring.register_event_duration_secs_listener(record)
    jax.pmap(lambda x: x)(np.arange(8))
    made.mapped = made.compiled.pop()
    flags = [*small, f'--workdir={made.workdir}', '--profile=2:4', '--json']
    code, out, err = run_command(train.main, *flags)
    jax.monitoring.unregister_event_duration_listener(record)
    monkeypatch.undo()
    assert code == 0, err
    made.out, made.err = out, err
  return made


@pytest.fixture
def workdir(trained):
  """The workdir of the finished run."""
  return trained.workdir


class TestRun:
  """One run of six steps, and its files."""

  def test_logs_the_settings_and_the_progress(self, trained):
    for text in (
      'nfnet_pico: 91,802 parameters, 0.000796 G multiply-adds',
      'digits: 1,442 images, 10 classes, 8 shards',
      '6 steps of 16 (0.1 epochs), peak learning rate 0.1, float32',
      'devices    8 x cpu (cpu), process 0 of 1',
      f'jax {jax.__version__}',
      f'programs   {jax.config.jax_compilation_cache_dir}',
      'classifier kernel',
      'step 4/6  loss 2.30',
      'img/s',
      'clipped',
      'eta',
      'evaluation at step 6',
      'raw weights: top-1',
      'EMA weights: top-1',
    ):
      assert text in trained.err

  def test_compiles_each_step_once(self, trained):
    """The step of training and that of evaluation."""
    assert trained.compiled.count(trained.mapped) == 2

  def test_the_summary(self, trained, workdir):
    lines = trained.err.splitlines()[-8:]
    summary = dict(re.split('  +| ', line, maxsplit=1) for line in lines)
    best = r'top-1 [\d.]+ % raw at step 6, [\d.]+ % EMA at step 6'
    assert re.fullmatch(best, summary['best'])
    assert summary['steps'] == '6 here, 6 in all'
    assert re.fullmatch(
      r'[\d.]+ (s|min): training [\d.]+ s, compiling [\d.]+ s, evaluating '
      r'[\d.]+ s, saving [\d.]+ s, other [\d.]+ s',
      summary['time'],
    )
    assert re.fullmatch(
      r'[\d,]+ images/s, waiting for data \d+ % of the time', summary['speed']
    )
    assert summary['checkpoint'] == str(workdir / 'checkpoints' / '6')
    assert summary['curves'] == str(workdir / 'curves.png')

  def test_the_summary_as_json(self, trained):
    result = json.loads(trained.out)
    assert result['step'] == result['steps'] == 6
    assert result['best_top1'] == result['top1']
    assert result['best_ema_top1'] == result['ema_top1']
    assert result['images_per_second'] > 0
    assert 0 <= result['data_wait'] <= 1
    assert result['peak_bytes'] is None  # CPUs do not report it.
    parts = ('train_s', 'compile_s', 'eval_s', 'save_s')
    assert 0 < sum(result[part] for part in parts) < result['seconds']

  def test_the_scopes_are_in_the_trace(self, workdir):
    folder = profiling.folder_of(workdir, range(2, 4))
    trace = (folder / 'process_0.xplane.pb').read_bytes()
    for scope in ('stage_0', 'stage_3', 'standardize', 'update', 'agc'):
      assert f'/{scope}/'.encode() in trace

  def test_speed_is_in_tensorboard_and_not_in_the_rows(self, workdir):
    tags = tags_of(workdir)
    for step in (2, 4, 6):
      assert {('images_per_second', step), ('data_wait', step)} <= tags
    assert not any('images_per_second' in row for row in rows_of(workdir))

  def test_writes_all_files_of_a_run(self, workdir):
    present = {path.name for path in workdir.iterdir()}
    assert present == {
      'classes.txt',
      'config.json',
      'metrics.jsonl',
      'time.jsonl',
      'tensorboard',
      'checkpoints',
      'curves.png',
      *profiling.folder_of(workdir, range(2, 4)).relative_to(workdir).parts[:1],
    }
    assert {p.name for p in (workdir / 'checkpoints').iterdir()} == {'3', '6'}
    config = json.loads((workdir / 'config.json').read_text())
    assert config['batch_size'] == 16
    assert config['data']['image_size'] == config['data']['eval_size'] == 32

  def test_every_step_has_a_row(self, workdir):
    rows = rows_of(workdir)
    training = [row for row in rows if 'loss' in row]
    assert [row['step'] for row in training] == [1, 2, 3, 4, 5, 6]
    (evaluation,) = [row for row in rows if 'eval/top1' in row]
    assert evaluation['step'] == 6
    assert evaluation['eval/examples'] == 355
    assert evaluation['eval_ema/examples'] == 355

  def test_evaluate_repeats_the_last_evaluation(self, run_command, workdir):
    # Half the batch, so that padding differs.
    arguments = f'--workdir={workdir}', '--config.run.eval_batch_size=30'
    code, out, err = run_command(
      evaluate.main, *arguments, '--json', on_a_run=True
    )
    assert code == 0, err
    assert err == f'programs   {jax.config.jax_compilation_cache_dir}\n'
    result = json.loads(out)
    (row,) = [row for row in rows_of(workdir) if 'eval/top1' in row]
    assert result['step'] == 6
    assert result['examples'] == 355
    for name in ('loss', 'top1', 'top5'):
      expected = row[f'eval/{name}'], row[f'eval_ema/{name}']
      assert (result[name], result[f'ema_{name}']) == pytest.approx(
        expected, rel=1e-6
      )

  @pytest.mark.slow
  def test_evaluates_on_any_number_of_devices(
    self, run_command, workdir, monkeypatch
  ):
    three = jax.local_devices()[:3]
    monkeypatch.setattr(jax, 'local_devices', lambda: three)
    monkeypatch.setattr(jax, 'device_count', lambda: 3)
    arguments = f'--workdir={workdir}', '--json'
    code, out, err = run_command(evaluate.main, *arguments, on_a_run=True)
    assert code == 0, err
    (row,) = [row for row in rows_of(workdir) if 'eval/top1' in row]
    assert json.loads(out)['top1'] == row['eval/top1']
    assert json.loads(out)['examples'] == 355

  def test_begins_with_one_copy_of_the_state(
    self, run_command, small, tmp_path, monkeypatch
  ):
    """The initial state does not stay on a device."""
    before, held = jax.live_arrays(), []
    run = loop.Loop.run

    def recording(self, state, step):
      known = {id(array) for array in before}
      new = [array for array in jax.live_arrays() if id(array) not in known]
      held.append(sum(array.nbytes for array in new))
      held.append(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
      return run(self, state, step)

    monkeypatch.setattr(loop.Loop, 'run', recording)
    code, _, err = run_command(train.main, *small, f'--workdir={tmp_path}')
    assert code == 0, err
    all_bytes, state_bytes = held
    assert all_bytes < 1.1 * state_bytes

  def test_resumes_bit_for_bit(self, run_command, small, workdir, tmp_path):
    """Copy the run as it was after step 3, and resume it."""
    kept = tmp_path / 'checkpoints' / '3'
    shutil.copytree(workdir / 'checkpoints' / '3', kept)
    rows = (workdir / 'metrics.jsonl').read_text().splitlines(keepends=True)
    (tmp_path / 'metrics.jsonl').write_text(''.join(rows[:3]))
    shutil.copy(workdir / 'config.json', tmp_path)
    events = []
    record = lambda name, **details: events.append(name)
    jax.monitoring.register_event_listener(record)
    code, _, err = run_command(train.main, *small, f'--workdir={tmp_path}')
    jax.monitoring.unregister_event_listener(record)
    assert code == 0, err
    assert 'Resuming after step 3.' in err
    assert rows_of(tmp_path) == rows_of(workdir)
    ours, theirs = state_of(tmp_path, 6), state_of(workdir, 6)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    # The step of training and that of evaluation.
    assert events.count('/jax/compilation_cache/cache_hits') >= 2

  @pytest.mark.slow
  def test_a_read_error_loses_no_step(
    self, run_command, small, workdir, tmp_path, monkeypatch
  ):
    arguments = *small, f'--workdir={tmp_path}'
    error = faults.ReadError('the bucket is busy; all files are well')
    fail_at(monkeypatch, 5, error)
    code, _, err = run_command(train.main, *arguments)
    assert code == 1
    last = err.splitlines()[-1]
    assert 'the bucket is busy; all files are well' in last
    assert 'The same command tries again.' in last
    monkeypatch.undo()
    # Batches are fetched ahead of the step that is to take them.
    saved = max(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())
    assert saved >= 3
    code, _, err = run_command(train.main, *arguments)
    assert code == 0, err
    assert f'Resuming after step {saved}.' in err
    assert rows_of(tmp_path) == rows_of(workdir)
    ours, theirs = state_of(tmp_path, 6), state_of(workdir, 6)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)

  @pytest.mark.full
  @pytest.mark.parametrize(
    ('paths', 'summary'),
    [
      ('fast_stem,fused_blocks', ', fast stem, fused blocks'),
      ('fast_convs', ', fast convolutions'),
    ],
  )
  def test_other_fast_paths_train_alike(
    self, run_command, small, workdir, tmp_path, paths, summary
  ):
    flag = f'--config.run.fast_paths={paths}'
    code, _, err = run_command(
      train.main, *small, flag, f'--workdir={tmp_path}'
    )
    assert code == 0, err
    assert f'peak learning rate 0.1, float32{summary}\n' in err
    assert '91,802 parameters, 0.000796 G multiply-adds' in err
    for ours, theirs in zip(rows_of(tmp_path), rows_of(workdir), strict=True):
      if 'loss' in ours:
        assert ours['loss'] == pytest.approx(theirs['loss'], rel=1e-5)

  @pytest.mark.full
  def test_crashed_and_resumed_with_sam_is_the_same_run(
    self, run_command, small, workdir, tmp_path, monkeypatch
  ):
    sam = '--config.optimizer.sam_rho=0.05'
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    code, _, err = run_command(train.main, *small, sam, f'--workdir={whole}')
    assert code == 0, err
    plain, rows = rows_of(workdir), rows_of(whole)
    assert rows[0]['step'] == plain[0]['step'] == 1
    assert rows[0]['loss'] > plain[0]['loss']  # Loss at the perturbed weights.
    with monkeypatch.context() as patch:
      fail_at(patch, 5, ZeroDivisionError('the disk burnt'))
      with pytest.raises(ZeroDivisionError):
        run_command(train.main, *small, sam, f'--workdir={parts}')
    code, _, err = run_command(train.main, *small, sam, f'--workdir={parts}')
    assert code == 0, err
    assert 'Resuming after step 3.' in err
    assert rows_of(parts) == rows
    jax.tree.map(
      np.testing.assert_array_equal, state_of(parts, 6), state_of(whole, 6)
    )
    code, _, err = run_command(train.main, *small, f'--workdir={parts}')
    assert code == 2
    assert 'optimizer.sam_rho: 0.05 there, 0.0 here' in err

  def test_finished_run_is_only_evaluated(self, run_command, small, workdir):
    before = rows_of(workdir)
    # The steps to trace have passed.
    arguments = [*small, f'--workdir={workdir}', '--profile=2:4']
    code, out, err = run_command(train.main, *arguments)
    assert (code, out) == (0, ''), err
    assert 'Resuming after step 6.' in err
    assert 'profile of steps' not in err
    assert 'steps      0 here, 6 in all' in err
    assert 'speed      no step was timed' in err
    assert [row for row in rows_of(workdir) if 'loss' in row] == [
      row for row in before if 'loss' in row
    ]

  def test_past_steps_cannot_be_traced(self, run_command, small, workdir):
    arguments = [*small, f'--workdir={workdir}', '--profile=3:4']
    code, out, err = run_command(train.main, *arguments)
    assert (code, out) == (2, '')
    (line,) = err.splitlines()
    assert '--profile=3:4 begins before step 6' in line

  @pytest.mark.parametrize('main', [train.main, evaluate.main])
  def test_another_experiment_is_refused(
    self, run_command, small, workdir, main
  ):
    arguments = [*small, '--config.seed=1', f'--workdir={workdir}']
    code, _, err = run_command(main, *arguments)
    assert code == 2
    assert 'holds another experiment (seed: 0 there, 1 here)' in err
    assert len(err.strip().splitlines()) == 1

  def test_an_evaluation_can_be_interrupted(
    self, run_command, workdir, monkeypatch
  ):
    stream = experiment_lib.Experiment.eval_batches

    def interrupted(self, log_fn):
      for batch in stream(self, log_fn):
        signal.raise_signal(signal.SIGTERM)
        yield batch

    monkeypatch.setattr(experiment_lib.Experiment, 'eval_batches', interrupted)
    result = run_command(evaluate.main, f'--workdir={workdir}', on_a_run=True)
    assert result[:2] == (1, '')
    assert result[2].splitlines()[-1] == 'nfnet_jax: Interrupted.'
