"""What operators of runs see: traces, speed, a summary."""

import json
import re
import signal
import types

import jax
import pytest
from tensorboardX.proto import event_pb2

from nfnet_jax.cli import results
from nfnet_jax.config import experiment as experiment_lib
from nfnet_jax.distributed import processes
from nfnet_jax.experiments import evaluate, train
from nfnet_jax.training import metrics, profiling
from tests.experiments import test_train


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  return tmp_path_factory.mktemp('run')


def tags_of(workdir):
  """The names and steps of what TensorBoard shows."""
  (path,) = (workdir / 'tensorboard').iterdir()
  content, tags = path.read_bytes(), set()
  while content:
    size = int.from_bytes(content[:8], 'little')
    event = event_pb2.Event.FromString(content[12 : 12 + size])
    tags |= {(value.tag, event.step) for value in event.summary.value}
    content = content[16 + size :]
  return tags


class TestRun:
  """One run of six steps, traced, with its summary and files."""

  def test_the_summary(self, run_command, small, workdir):
    arguments = [*small, f'--workdir={workdir}', '--profile=2:4', '--json']
    code, out, err = run_command(train.main, *arguments)
    assert code == 0, err
    lines = err.splitlines()
    summary = dict(re.split('  +| ', line, maxsplit=1) for line in lines[-8:])
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
    result = json.loads(out)
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
    for row in metrics.read_metrics(workdir / 'metrics.jsonl'):
      assert 'images_per_second' not in row

  def test_past_steps_cannot_be_traced(self, run_command, small, workdir):
    arguments = [*small, f'--workdir={workdir}', '--profile=3:4']
    assert run_command(train.main, *arguments) == (
      2,
      '',
      'nfnet_jax: --profile=3:4 begins before step 6, from which the run '
      'resumes.\n',
    )

  def test_the_same_command_still_resumes(self, run_command, small, workdir):
    arguments = [*small, f'--workdir={workdir}', '--profile=2:4', '--json']
    code, out, err = run_command(train.main, *arguments)
    assert code == 0, err
    assert 'profile of steps' not in err
    assert 'speed      no step was timed' in err
    result = json.loads(out)
    assert (result['step'], result['steps']) == (6, 0)
    assert result['images_per_second'] is None

  def test_the_next_start_compiles_nothing_and_is_the_same(
    self, run_command, small, workdir, tmp_path
  ):
    events = []
    record = lambda name, **details: events.append(name)
    jax.monitoring.register_event_listener(record)
    code, _, err = run_command(train.main, *small, f'--workdir={tmp_path}')
    jax.monitoring.unregister_event_listener(record)
    assert code == 0, err
    folder = jax.config.jax_compilation_cache_dir
    assert f'programs   {folder}' in err
    # At least the two steps.
    assert events.count('/jax/compilation_cache/cache_hits') >= 2
    assert test_train.rows_of(tmp_path) == test_train.rows_of(workdir)

  def test_evaluate_logs_the_cache_folder(self, run_command, workdir):
    arguments = f'--workdir={workdir}', '--json'
    code, _, err = run_command(evaluate.main, *arguments, on_a_run=True)
    assert code == 0, err
    assert err == f'programs   {jax.config.jax_compilation_cache_dir}\n'


def test_an_interrupted_run_logs_its_progress(
  run_command, small, tmp_path, monkeypatch
):
  stream = experiment_lib.Experiment.train_batches

  def interrupted(self, first_step, log_fn):
    for batch in stream(self, first_step, log_fn):
      if batch['step'] == 5:
        signal.raise_signal(signal.SIGTERM)
      yield batch

  monkeypatch.setattr(experiment_lib.Experiment, 'train_batches', interrupted)
  arguments = [*small, f'--workdir={tmp_path}', '--profile=1:6']
  code, out, err = run_command(train.main, *arguments)
  assert (code, out) == (75, '')
  traced, last = err.splitlines()[-2:]
  match = re.fullmatch(
    r'Interrupted and saved at step (\d) of 6, (\d) of them here in [\d.]+ s '
    r'\([\d,]+ images/s, waiting for data \d+ % of the time\)\. The same '
    rf'command resumes from {tmp_path}\.',
    last,
  )
  assert match[1] == match[2]
  assert traced.startswith(f'profile of steps 1 to {match[1]}: ')
  monkeypatch.undo()
  code, _, err = run_command(train.main, *arguments)
  assert code == 0, err
  assert f'Resuming after step {match[1]}.' in err
  assert f'steps      {6 - int(match[1])} here, 6 in all' in err


def test_several_processes_log_the_speed_per_device(monkeypatch):
  speed = {'images_per_second': 8000.0, 'data_wait': 0.021}
  throughput = types.SimpleNamespace(overall=lambda: speed)
  finished = types.SimpleNamespace(throughput=throughput)
  expected = '8,000 images/s, waiting for data 2 % of the time'
  assert results._speed(finished) == expected
  monkeypatch.setattr(processes, 'are_several', lambda: True)
  expected = (
    '8,000 images/s (1,000 per device), waiting for data 2 % of the time'
  )
  assert results._speed(finished) == expected


def test_peak_memory_is_that_of_the_fullest_device(monkeypatch):
  class Device:
    def __init__(self, peak):
      self.memory_stats = lambda: peak and {'peak_bytes_in_use': peak}

  assert results.peak_bytes() is None
  devices = [Device(3), Device(7), Device(None)]
  monkeypatch.setattr(jax, 'local_devices', lambda: devices)
  assert results.peak_bytes() == 7


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [(0.04, '0.0 s'), (119.9, '119.9 s'), (150, '2.5 min'), (9000, '2.5 h')],
)
def test_durations_are_short(seconds, text):
  assert results._duration(seconds) == text
