"""`kill -9` at many moments, compilation and saving included."""

import signal
import time

import numpy as np
import pytest

from nfnet_jax.experiments import train
from tests.end_to_end.test_processes import (
  checkpoints_of,
  Process,
  rows_of,
)

pytestmark = pytest.mark.slow


def test_any_moment(small, tmp_path, door):
  """Kills until the run is done; it must end as if never disturbed."""
  arguments = [
    *small,
    '--config.train_for=120 steps',
    '--config.run.eval_every=30 steps',
    '--config.run.checkpoint_every=1 step',
  ]
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  code, _, err = door(train.main, *arguments, f'--workdir={whole}')
  assert code == 0, err
  rng = np.random.default_rng(0)
  reached = []
  while True:
    process = Process(arguments, broken)
    if len(reached) < 12:
      process.wait_for('gains and biases')
      # From before the first step to well into saving.
      time.sleep(rng.uniform(0, 14))
      process.send(signal.SIGKILL)
    code = process.finish()
    done = checkpoints_of(broken) if (broken / 'checkpoints').exists() else []
    reached.append(max(done, default=0))
    assert reached == sorted(reached), 'A saved step was lost.'
    if code == 0:
      break
    assert code == -signal.SIGKILL, process.lines
  assert rows_of(broken) == rows_of(whole)
  assert len(set(reached)) > 3, reached
