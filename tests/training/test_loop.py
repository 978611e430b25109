"""The loop on a network of one layer: interruption, bad steps, cadence."""

import itertools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnet_jax import errors
from nfnet_jax.distributed import preemption
from nfnet_jax.models import inputs
from nfnet_jax.training import (
  checkpoint,
  data_parallel,
  evaluation,
  nonfinite,
)
from tests.training.linear_runs import (
  assert_same_run,
  eval_batches,
  EXAMPLES,
  make_trainer,
  Run,
  train_batches,
)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  run = Run(tmp_path_factory.mktemp('whole'))
  run.results = run.go()
  return run


def test_cadence(whole):
  rows = whole.rows()
  assert [r['step'] for r in rows if 'loss' in r] == list(range(1, 13))
  # Every 4.5 steps, counted without drift, and at the end.
  assert [r['step'] for r in rows if 'eval/top1' in r] == [5, 9, 12]
  assert whole.saved() == [5, 10, 12]
  assert whole.results == rows[-1] | {'step': 12}
  lines = whole.output.getvalue().splitlines()
  shown = [line.split()[1] for line in lines if line.startswith('step')]
  assert shown == ['3/12', '6/12', '9/12', '12/12']
  assert lines[-2].startswith('step 12/12')
  evaluated = [line for line in lines if line.startswith('evaluation')]
  assert [line.split()[3] for line in evaluated] == ['5:', '9:', '12:']


def test_evaluation_is_exact(whole):
  """Compare a prime number of examples on eight devices to plain NumPy."""
  final = whole.restore(12)
  logits, labels = [], []
  for batch in eval_batches():
    kept = batch['mask'] > 0
    images = np.asarray(inputs.normalize_images(batch['image'][kept]))
    w, b = (final.params['linear'][name] for name in 'wb')
    logits.append(images.mean((1, 2)) @ w + b)
    labels.append(batch['label'][kept])
  logits, labels = np.concatenate(logits), np.concatenate(labels)
  assert len(labels) == EXAMPLES
  order = np.argsort(-logits, axis=1, kind='stable')
  results = whole.results
  assert results['eval/examples'] == EXAMPLES
  assert results['eval/top1'] == np.mean(order[:, 0] == labels)
  assert results['eval/top5'] == np.mean(
    np.any(order[:, :5] == labels[:, None], axis=1)
  )
  log_sums = np.log(np.exp(logits).sum(1))
  losses = log_sums - logits[np.arange(EXAMPLES), labels]
  np.testing.assert_allclose(results['eval/loss'], losses.mean(), rtol=1e-5)


def test_empty_evaluation_is_an_error(tmp_path):
  run = Run(tmp_path, eval_batches=lambda: eval_batches(0))
  with pytest.raises(ValueError, match='no examples'):
    run.go()


@pytest.mark.parametrize(
  ('at', 'number'),
  [
    (0, signal.SIGTERM),
    (4, signal.SIGTERM),
    (5, signal.SIGINT),
    (11, signal.SIGTERM),
  ],
)
def test_interrupted_run_resumes_bit_for_bit(tmp_path, whole, at, number):
  def interrupted(first):
    for batch in train_batches(first):
      if batch['step'] == at:
        os.kill(os.getpid(), number)
      yield batch

  with pytest.raises(preemption.Interrupted):
    Run(tmp_path, train_batches=interrupted).go()
  resumed = Run(tmp_path)
  resumed.go()
  assert_same_run(resumed, whole)


def test_interrupted_evaluation_is_repeated(tmp_path, whole):
  def interrupted():
    batches = eval_batches()
    yield next(batches)
    os.kill(os.getpid(), signal.SIGTERM)
    yield from batches

  run = Run(tmp_path, eval_batches=interrupted)
  with pytest.raises(preemption.Interrupted):
    run.go()
  assert run.saved() == [5]
  assert not [row for row in run.rows() if 'eval/top1' in row]
  resumed = Run(tmp_path)
  resumed.go()
  assert_same_run(resumed, whole)


def test_second_sigterm_does_not_disturb_the_save(tmp_path, whole, monkeypatch):
  save = checkpoint.Checkpoints.save

  def disturbed(self, train_state):
    os.kill(os.getpid(), signal.SIGTERM)
    save(self, train_state)

  def interrupted(first):
    for batch in train_batches(first):
      if batch['step'] == 3:
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpoints, 'save', disturbed)
    with pytest.raises(preemption.Interrupted):
      Run(tmp_path, train_batches=interrupted).go()
  resumed = Run(tmp_path)
  assert resumed.saved()
  resumed.go()
  assert_same_run(resumed, whole)


def test_signal_handlers_are_restored():
  before = signal.getsignal(signal.SIGTERM)
  with preemption.StopRequest() as stop:
    assert not stop.poll()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.poll()
  assert signal.getsignal(signal.SIGTERM) is before


def test_bad_evaluation_data_loses_no_step(tmp_path, whole):
  evaluations = itertools.count(1)

  def bad():
    batches = eval_batches()
    yield next(batches)
    if next(evaluations) == 2:
      raise errors.InputError('the record is bad.')
    yield from batches

  with pytest.raises(errors.InputError, match='the record is bad'):
    Run(tmp_path, eval_batches=bad).go()
  resumed = Run(tmp_path)
  assert resumed.saved() == [5, 9]  # The second evaluation follows step 9.
  resumed.go()
  assert_same_run(resumed, whole)


@pytest.mark.parametrize('at', [1, 7])
def test_bad_images_end_the_run_with_the_last_good_state(tmp_path, whole, at):
  def poisoned(first):
    for batch in train_batches(first):
      if batch['step'] == at:
        batch['image'][5, 0, 0, 0] = np.nan
      yield batch

  run = Run(tmp_path, train_batches=poisoned)
  with pytest.raises(nonfinite.NonFiniteError, match="first in 'images'") as e:
    run.go()
  assert e.value.step == at
  assert 'a lower learning rate' in str(e.value)
  assert run.saved()[-1] == at
  steps = [row['step'] for row in run.rows() if 'loss' in row]
  assert steps == list(range(1, at + 1))
  # With good images, the run continues as if nothing had happened.
  resumed = Run(tmp_path)
  resumed.go()
  assert_same_run(resumed, whole)


@pytest.mark.parametrize(
  ('scale', 'first'), [(1e36, 'gradient norm'), (1e38, 'images')]
)
@pytest.mark.filterwarnings('ignore:overflow')
def test_explosion_names_the_first_tensor(tmp_path, scale, first):
  """Finite gradients whose squares overflow are detected as well."""

  def huge(first):
    for batch in train_batches(first):
      yield {**batch, 'image': batch['image'] * np.float32(scale)}

  run = Run(tmp_path, train_batches=huge)
  with pytest.raises(nonfinite.NonFiniteError) as error:
    run.go()
  assert error.value.step == 0
  assert error.value.tensors[0] == first
  assert run.saved() == [0]


def test_nonfinite_learning_rate_is_not_applied(tmp_path):
  schedule = lambda step: jnp.where(step < 7, 0.1, jnp.nan)
  run = Run(tmp_path, trainer=make_trainer(schedule))
  with pytest.raises(nonfinite.NonFiniteError, match="in 'learning rate'") as e:
    run.go()
  assert (e.value.step, e.value.tensors) == (7, ['learning rate'])
  assert run.saved()[-1] == 7
  with checkpoint.Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    good = checkpoints.restore_fields(['params'], 7)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(good))


def test_next_batches_are_placed_before_they_are_needed(tmp_path, monkeypatch):
  placed, seen = [], []
  shard_batch = data_parallel.DataParallel.shard_batch
  compile_step = data_parallel.DataParallel.train_step

  def recording_shard_batch(self, batch):
    placed.append('step' in batch)
    return shard_batch(self, batch)

  def recording_train_step(self, function):
    compiled = compile_step(self, function)

    def train_step(train_state, batch):
      seen.append(sum(placed))
      return compiled(train_state, batch)

    return train_step

  parallel = data_parallel.DataParallel
  monkeypatch.setattr(parallel, 'shard_batch', recording_shard_batch)
  monkeypatch.setattr(parallel, 'train_step', recording_train_step)
  Run(tmp_path).go()
  assert seen == [index + 3 for index in range(12)]


def test_report_and_json_names():
  results = {
    f'{kind}/{name}': 0.5
    for kind in ('eval', 'eval_ema')
    for name in ('loss', 'top1', 'top5')
  } | {'eval/examples': 10, 'eval_ema/examples': 10}
  assert set(evaluation.flat_names(results)) == {
    'examples',
    'loss',
    'top1',
    'top5',
    'ema_loss',
    'ema_top1',
    'ema_top5',
  }
  assert 'raw weights: top-1 50.00 %' in evaluation.report(results)
