"""The command `train`, run in this process through the real loop."""

import json
import pathlib
import signal

import jax
import numpy as np
import pytest

from nfnet_jax.config import experiment as experiment_lib
from nfnet_jax.config import steps
from nfnet_jax.config import workdir as workdir_lib
from nfnet_jax.experiments import evaluate, train
from nfnet_jax.training import checkpoint, loop


def rows_of(workdir):
  text = (pathlib.Path(workdir) / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def state_of(workdir, step):
  config = workdir_lib.load(workdir)
  template = steps.open_experiment(config).abstract_state()
  with checkpoint.Checkpoints(workdir / 'checkpoints') as checkpoints:
    return checkpoints.restore(step, template)


@pytest.fixture(scope='module')
def compilations():
  """Return the functions that XLA compiles, in order."""
  durations = []

  def record(event, duration, **details):
    del duration
    if event == '/jax/core/compile/backend_compile_duration':
      durations.append(details.get('fun_name', ''))

  jax.monitoring.register_event_duration_secs_listener(record)
  return durations


def crash_at(monkeypatch, step, error):
  """Let the data stream fail in place of a step's batch."""
  stream = experiment_lib.Experiment.train_batches

  def failing(self, first_step, log_fn):
    for batch in stream(self, first_step, log_fn):
      if batch['step'] == step:
        raise error
      yield batch

  monkeypatch.setattr(experiment_lib.Experiment, 'train_batches', failing)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('run')


@pytest.fixture
def workdir(run_command, small, folder):
  """Return the workdir of the finished run; train it if it is not there."""
  if not (folder / 'metrics.jsonl').exists():
    code, _, err = run_command(train.main, *small, f'--workdir={folder}')
    assert code == 0, err
  return folder


class TestRun:
  """One run of six steps, and its files."""

  def test_trains_and_reports_it(
    self, run_command, small, folder, compilations, monkeypatch
  ):
    run = loop.Loop.run
    guard = jax.transfer_guard('disallow')  # The loop transfers by name only.
    monkeypatch.setattr(loop.Loop, 'run', guard(run))
    code, out, err = run_command(train.main, *small, f'--workdir={folder}')
    assert code == 0, err
    assert not out
    for text in (
      'nfnet_pico: 91,802 parameters, 0.000796 G multiply-adds',
      'digits: 1,442 images, 10 classes, 8 shards',
      '6 steps of 16 (0.1 epochs), peak learning rate 0.1, float32',
      'devices    8 x cpu (cpu), process 0 of 1',
      f'jax {jax.__version__}',
      'classifier kernel',
      'step 4/6  loss 2.30',
      'img/s',
      'clipped',
      'eta',
      'evaluation at step 6',
      'raw weights: top-1',
      'EMA weights: top-1',
      str(folder / 'curves.png'),
    ):
      assert text in err
    steps = [name for name in compilations if 'step' in name]
    assert len(steps) == len(set(steps)), 'A step was compiled twice.'

  def test_writes_all_files_of_a_run(self, workdir):
    present = {path.name for path in workdir.iterdir()}
    assert present == {
      'classes.txt',
      'config.json',
      'metrics.jsonl',
      'tensorboard',
      'checkpoints',
      'curves.png',
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
    result = json.loads(out)
    (row,) = [row for row in rows_of(workdir) if 'eval/top1' in row]
    assert result['step'] == 6
    assert result['examples'] == 355
    for name in ('loss', 'top1', 'top5'):
      expected = row[f'eval/{name}'], row[f'eval_ema/{name}']
      assert (result[name], result[f'ema_{name}']) == pytest.approx(
        expected, rel=1e-6
      )

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

  def test_crashed_and_resumed_is_the_same_run_bit_for_bit(
    self, run_command, small, workdir, tmp_path, monkeypatch
  ):
    with monkeypatch.context() as patch:
      crash_at(patch, 5, ZeroDivisionError('the disk burnt'))
      with pytest.raises(ZeroDivisionError):
        run_command(train.main, *small, f'--workdir={tmp_path}')
    assert [row['step'] for row in rows_of(tmp_path)][:3] == [1, 2, 3]
    code, _, err = run_command(train.main, *small, f'--workdir={tmp_path}')
    assert code == 0, err
    assert 'Resuming after step 3.' in err
    assert rows_of(tmp_path) == rows_of(workdir)
    ours, theirs = state_of(tmp_path, 6), state_of(workdir, 6)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)

  @pytest.mark.slow
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

  @pytest.mark.slow
  def test_resumes_bit_for_bit_with_sam(
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
      crash_at(patch, 5, ZeroDivisionError('the disk burnt'))
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

  def test_a_read_error_loses_no_step(
    self, run_command, small, tmp_path, monkeypatch
  ):
    from nfnet_jax.data import faults, pipeline

    stream = pipeline.train_batches

    def failing(*arguments):
      for batch in stream(*arguments):
        if batch['step'] == 5:
          raise faults.ReadError('the bucket is busy; all files are well')
        yield batch

    arguments = *small, f'--workdir={tmp_path}'
    with monkeypatch.context() as patch:
      patch.setattr(pipeline, 'train_batches', failing)
      code, _, err = run_command(train.main, *arguments)
    assert code == 1
    assert err.splitlines()[-1] == (
      'nfnet_jax: the bucket is busy; all files are well. The same command '
      'tries again.'
    )
    # Batches are fetched ahead of the step that is to take them.
    assert (tmp_path / 'checkpoints' / '3').is_dir()
    saved = max(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())
    code, _, err = run_command(train.main, *arguments)
    assert code == 0, err
    assert f'Resuming after step {saved}.' in err

  def test_finished_run_is_only_evaluated(self, run_command, small, workdir):
    before = rows_of(workdir)
    code, out, err = run_command(
      train.main, *small, f'--workdir={workdir}', '--json'
    )
    assert code == 0, err
    assert json.loads(out)['step'] == 6
    assert 'Resuming after step 6.' in err
    assert [row for row in rows_of(workdir) if 'loss' in row] == [
      row for row in before if 'loss' in row
    ]

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
