"""Real processes, killed for real."""

import json
import pathlib
import signal
import subprocess
import sys

import pytest

from nfnet_jax.experiments import train

STEPS = 40


class Process:
  """A training process whose standard error is read line by line."""

  def __init__(self, arguments, workdir):
    self.lines = []
    door = [sys.executable, '-m', 'nfnet_jax.experiments.train']
    self._process = subprocess.Popen(
      [*door, *arguments, f'--workdir={workdir}'],
      stderr=subprocess.PIPE,
      text=True,
    )

  def wait_for(self, text):
    for line in self._process.stderr:
      self.lines.append(line)
      if text in line:
        return
    raise AssertionError(f"'{text}' never came:\n{''.join(self.lines)}")

  def send(self, number):
    self._process.send_signal(number)

  def finish(self):
    self.lines += self._process.stderr
    return self._process.wait(timeout=60)


@pytest.fixture
def arguments(small):
  return [
    *small,
    f'--config.train_for={STEPS} steps',
    '--config.run.eval_every=15 steps',
    '--config.run.checkpoint_every=5 steps',
  ]


def rows_of(workdir):
  text = (pathlib.Path(workdir) / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def checkpoints_of(workdir):
  names = (path.name for path in (workdir / 'checkpoints').iterdir())
  return sorted(int(name) for name in names if name.isdigit())


def test_killed_stopped_and_resumed_is_the_same_run(arguments, tmp_path, door):
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  code, _, err = door(train.main, *arguments, f'--workdir={whole}')
  assert code == 0, err

  first = Process(arguments, broken)
  first.wait_for('step 12/')
  first.send(signal.SIGKILL)
  assert first.finish() == -signal.SIGKILL

  second = Process(arguments, broken)
  second.wait_for('Resuming after step ')
  assert int(second.lines[-1].split()[-1].rstrip('.')) >= 5
  second.wait_for('step 22/')
  second.send(signal.SIGTERM)
  assert second.finish() == 75
  assert 'The same command resumes' in second.lines[-1]
  assert checkpoints_of(broken)[-1] >= 22

  third = Process(arguments, broken)
  assert third.finish() == 0, third.lines
  assert rows_of(broken) == rows_of(whole)
