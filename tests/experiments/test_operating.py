"""What operators see of a run that ends early, and how figures are written."""

import re
import signal
import types

import jax
import pytest

from nfnet_jax.cli import results
from nfnet_jax.config import experiment as experiment_lib
from nfnet_jax.distributed import processes
from nfnet_jax.experiments import train


@pytest.mark.slow
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


def interrupted_run(seconds=1.0, **speed):
  """Return the last line of an interrupted run that has these timings."""
  run = types.SimpleNamespace(
    cadence=types.SimpleNamespace(total=1000),
    stopwatch=types.SimpleNamespace(total=lambda: seconds),
    throughput=types.SimpleNamespace(steps=40, overall=lambda: speed),
  )
  return results.interrupted(run, 90, 'runs/1')


def test_several_processes_log_the_speed_per_device(monkeypatch):
  speed = {'images_per_second': 8000.0, 'data_wait': 0.021}
  rate = '8,000 images/s, waiting for data 2 % of the time'
  assert f'({rate})' in interrupted_run(**speed)
  monkeypatch.setattr(processes, 'are_several', lambda: True)
  rate = '8,000 images/s (1,000 per device), waiting for data 2 % of the time'
  assert f'({rate})' in interrupted_run(**speed)


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
  line = interrupted_run(seconds)
  assert f'40 of them here in {text} (no step was timed)' in line
  assert line.startswith('Interrupted and saved at step 90 of 1,000, ')
