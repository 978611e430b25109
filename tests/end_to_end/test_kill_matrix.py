"""`kill -9` at many moments, compilation and saving included."""

import signal
import time

import numpy as np
import pytest

from nfnet_jax.experiments import train
from tests.end_to_end import pods

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
    process = pods.Process(
      pods.TRAIN,
      *arguments,
      f'--workdir={broken}',
    )
    if len(reached) < 12:
      process.wait_for('gains and biases')
      # From before the first step to well into saving.
      time.sleep(rng.uniform(0, 14))
      process.send(signal.SIGKILL)
    code = process.finish()
    reached.append(max(pods.checkpoints_of(broken), default=0))
    assert reached == sorted(reached), 'A saved step was lost.'
    if code == 0:
      break
    assert code == -signal.SIGKILL, process.said
  assert pods.rows_of(broken) == pods.rows_of(whole)
  assert len(set(reached)) > 3, reached
