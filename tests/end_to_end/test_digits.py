"""Accuracy of the README's first command, for three seeds."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.full


@pytest.mark.parametrize('seed', range(3))
def test_digits_reach_98_percent(seed, tmp_path):
  environment = os.environ | {'XLA_FLAGS': ''}
  command = [sys.executable, '-m', 'nfnet_jax.experiments.train']
  command += ['--config=digits', f'--config.seed={seed}']
  command += [f'--workdir={tmp_path}', f'--config.run.data_dir={tmp_path}']
  subprocess.run(command, check=True, env=environment)
  rows = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  final = [json.loads(row) for row in rows if 'eval/top1' in row][-1]
  assert final['eval/top1'] >= 0.98
  assert final['eval_ema/top1'] >= 0.98
