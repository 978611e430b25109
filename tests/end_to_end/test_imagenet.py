"""The whole published recipe on a small ImageNet, through the commands."""

import json
import re

import numpy as np
from PIL import Image
import pytest

from nfnet_jax.config import workdir as workdir_lib
from nfnet_jax.experiments import evaluate, train
from nfnet_jax.training import metrics
from tests import imagenet

pytestmark = pytest.mark.slow


def rows(workdir):
  return metrics.read_metrics(workdir / 'metrics.jsonl')


def test_two_epochs_of_the_recipe(run_command, small_recipe, tmp_path):
  code, _, err = run_command(train.main, *small_recipe, f'--workdir={tmp_path}')
  assert code == 0
  assert (
    'distorted crop, flip, MixUp and CutMix (fresh), RandAugment 4 x 5' in err
  )
  assert re.search(r'step 12/12 .* data \d+%', err)
  steps = [row for row in rows(tmp_path) if 'loss' in row]
  assert [row['step'] for row in steps] == list(range(1, 13))
  assert all(np.isfinite(row['loss']) for row in steps)
  saved = workdir_lib.load(tmp_path)
  assert saved.data.randaugment_magnitude == 5
  code, out, _ = run_command(
    evaluate.main, f'--workdir={tmp_path}', '--json', on_a_run=True
  )
  assert code == 0
  results = json.loads(out)
  assert (results['step'], results['examples']) == (12, imagenet.VALIDATION)
  # Twelve steps learn nothing: the loss is that of uniform guesses.
  assert abs(results['loss'] - np.log(1000)) < 0.2


def test_recipe_resumes_bit_for_bit(run_command, small_recipe, tmp_path):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  in_batch = [*small_recipe, '--config.data.partners=in_batch']
  assert run_command(train.main, *in_batch, f'--workdir={whole}')[0] == 0

  half = [*in_batch, f'--workdir={parts}']
  code, _, err = run_command(
    train.main, *half, '--config.run.data_dir=/nowhere'
  )
  assert code == 2
  assert 'not prepared under /nowhere' in err

  stop_after = 7
  run_and_fail(run_command, half, stop_after)
  code, _, err = run_command(train.main, *half)
  assert code == 0
  assert f'Resuming after step {stop_after}.' in err
  assert rows(parts) == rows(whole)


def run_and_fail(run_command, flags, steps):
  """Run with data that fails after some steps; the state is saved."""
  from nfnet_jax.data import faults, pipeline

  stream = pipeline.train_batches

  def failing(*args, **options):
    for batch in stream(*args, **options):
      if batch['step'] == steps + 2:  # Two batches are prefetched.
        raise faults.BadDataError("dataset 'x': record 3 cannot be decoded")
      yield batch

  pipeline.train_batches = failing
  try:
    code, _, err = run_command(train.main, *flags)
  finally:
    pipeline.train_batches = stream
  assert code == 2
  assert err.splitlines()[-1] == (
    "nfnet_jax: dataset 'x': record 3 cannot be decoded"
  )


def test_network_learns_images_of_a_folder(run_command, tmp_path):
  """Images of three colours, with the recipe's crops and mixing."""
  for index in range(12):
    for name, colour in (('r', 'red'), ('g', 'lime'), ('b', 'blue')):
      folder = tmp_path / 'photos' / ('train' if index < 8 else 'test') / name
      folder.mkdir(parents=True, exist_ok=True)
      Image.new('RGB', (40, 30), colour).save(folder / f'{index}.png')
  code, out, _ = run_command(
    train.main,
    '--config=f0',
    '--config.model.name=nfnet_pico',
    f'--config.dataset={tmp_path}/photos',
    '--config.data.eval_split=test',
    '--config.data.shards=8',
    '--config.batch_size=16',
    '--config.train_for=60 steps',
    '--config.ema_decay=0.9',
    '--config.optimizer.warmup=5 steps',
    '--config.optimizer.learning_rate=0.2',
    '--config.data.eval_margin=0',
    f'--workdir={tmp_path}/run',
    '--json',
  )
  assert code == 0
  results = json.loads(out)
  assert results['examples'] == 12
  assert results['top1'] == 1
