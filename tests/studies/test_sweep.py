import dataclasses
import pathlib
import subprocess
import sys

import pandas as pd
import pytest

from experiments.studies import datasets, sweep, training
from nfnet_jax import errors
from nfnet_jax.training import metrics

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = {
  'dataset': 'digits',
  'model.name': 'nf_resnet_pico',
  'data.image_size': 16,
  'data.eval_size': 16,
  'batch_size': 16,
  'train_for': '6 steps',
  'optimizer.warmup': '2 steps',
}


def make_run(seed=0, **more):
  return training.Run(
    labels={'method': 'none', 'seed': seed, **more},
    config='digits',
    settings={
      **SETTINGS,
      'seed': seed,
      'optimizer.clipping': 0.0,
      **{f'optimizer.{name}': value for name, value in more.items()},
    },
    keep_steps=1 if not seed else 0,
  )


RUNS = [
  make_run(learning_rate=0.1),
  make_run(learning_rate=1e30),
  make_run(seed=1, learning_rate=0.1),
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Return a folder where the first two runs are done."""
  folder = tmp_path_factory.mktemp('study')
  sweep.sweep(RUNS[:2], folder, workers=1)
  return folder


@pytest.mark.slow
def test_run_is_that_of_the_training_command(folder, tmp_path):
  settings = {**RUNS[0].settings, 'run.data_dir': datasets.data_dir()}
  command = [sys.executable, '-m', 'nfnet_jax.experiments.train']
  command += ['--config=digits', f'--workdir={tmp_path}']
  command += [f'--config.{name}={value}' for name, value in settings.items()]
  subprocess.run(command, check=True)
  alone = metrics.read_metrics(tmp_path / 'metrics.jsonl')
  steps = pd.read_csv(folder / sweep.STEPS)
  steps = steps[steps.run == RUNS[0].key]
  losses = [row['loss'] for row in alone if 'loss' in row]
  assert steps.loss.tolist() == pytest.approx(losses, rel=1e-4)
  assert steps.learning_rate.max() == pytest.approx(0.1, rel=1e-4)
  row = pd.read_csv(folder / sweep.RESULTS).iloc[0]
  assert row.top1 == pytest.approx(alone[-1]['eval/top1'], abs=0.01)


@pytest.mark.slow
def test_diverged_run_ends_early_and_alone(folder):
  rows = pd.read_csv(folder / sweep.RESULTS)
  assert rows.diverged.tolist() == [0, 1]
  assert rows.steps[0] == 6
  assert rows.steps[1] < 6


@pytest.mark.slow
def test_second_sweep_trains_only_what_is_missing(folder):
  first = (folder / sweep.RESULTS).read_text()
  rows, _ = sweep.sweep(RUNS[:2], folder, workers=1)
  assert (folder / sweep.RESULTS).read_text() == first
  assert len(rows) == 2
  rows, steps = sweep.sweep(RUNS, folder, workers=2)
  assert (folder / sweep.RESULTS).read_text().startswith(first)
  assert rows.seed.tolist() == [0, 0, 1]
  assert set(steps.run) == {RUNS[0].key, RUNS[1].key}


def test_results_of_another_study_are_refused(tmp_path):
  (tmp_path / sweep.RESULTS).write_text('method,run\nnone,0123abcd\n')
  with pytest.raises(errors.InputError, match=r'results\.csv .* --out'):
    sweep.sweep(RUNS, tmp_path, workers=1)


def test_runs_with_other_numbers_share_a_program():
  first, second, other_seed = RUNS
  assert first.program == second.program == other_seed.program
  assert first.batches == second.batches != other_seed.batches
  clipped = dataclasses.replace(
    first, settings={**first.settings, 'optimizer.clipping': 0.01}
  )
  assert clipped.program != first.program
  assert len({run.key for run in (*RUNS, clipped)}) == 4
