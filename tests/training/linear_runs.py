"""Runs of the training loop on a network of one layer."""

import io
import json

import jax
import numpy as np

import nfnet_jax
from nfnet_jax.distributed import preemption
from nfnet_jax.training import (
  checkpoint,
  data_parallel,
  loop,
  metrics,
  profiling,
  progress,
  state,
  step,
)
from tests.training import small_models
from tests.training.batches import random_batch

BATCH, SIZE, CLASSES, EXAMPLES = 16, 4, small_models.CLASSES, 53


def make_trainer(learning_rate=0.1):
  """Return a trainer of a linear classifier."""
  return step.Trainer(
    model=small_models.linear(),
    optimizer=nfnet_jax.make_optimizer(learning_rate),
    schedule=(
      learning_rate if callable(learning_rate) else lambda _: learning_rate
    ),
    num_classes=CLASSES,
    global_batch=BATCH,
  )


def make_batch(index):
  return random_batch(index, count=BATCH, size=SIZE, classes=CLASSES)


def train_batches(first):
  while True:
    yield make_batch(first)
    first += 1


def eval_batches(size=EXAMPLES):
  """Yield a prime number of examples, padded with NaN to full batches."""
  for start in range(0, size, BATCH):
    batch = make_batch(1000 + start)
    mask = (np.arange(start, start + BATCH) < size).astype(np.float32)
    image = np.where(mask[:, None, None, None] > 0, batch['image'], np.nan)
    yield {'image': image, 'label': batch['label'][:, 0], 'mask': mask}


class Run:
  """A workdir and the loop over it."""

  def __init__(self, workdir, **changes):
    self.workdir = workdir
    self.output = io.StringIO()
    self.changes = changes

  def go(self, stop=None):
    trainer = self.changes.get('trainer') or make_trainer()
    fresh = state.create_state(
      trainer.model, trainer.optimizer, seed=0, image_size=SIZE
    )
    with (
      stop or preemption.StopRequest() as stop,
      checkpoint.Checkpoints(self.workdir / 'checkpoints', 9) as checkpoints,
    ):
      first = checkpoints.restore_latest(fresh) or fresh
      at = int(first.step)
      with (
        metrics.MetricsWriter(self.workdir, at) as writer,
        progress.Progress(at, 12, BATCH, self.output) as shown,
      ):
        parallel = data_parallel.DataParallel()
        return loop.Loop(
          trainer=trainer,
          parallel=parallel,
          train_batches=self.changes.get('train_batches', train_batches),
          eval_batches=self.changes.get('eval_batches', eval_batches),
          cadence=loop.Cadence(12, log=3, evaluate=4.5, checkpoint=5),
          checkpoints=checkpoints,
          writer=writer,
          progress=shown,
          stop=stop,
          tracer=self.changes.get('tracer') or profiling.Tracer(),
        ).run(parallel.shard_state(trainer.layout, first), at)

  def saved(self):
    names = (path.name for path in (self.workdir / 'checkpoints').iterdir())
    return sorted(map(int, names))

  def rows(self):
    text = (self.workdir / 'metrics.jsonl').read_text()
    return [json.loads(line) for line in text.splitlines()]

  def restore(self, at):
    trainer = make_trainer()
    template = state.abstract_state(trainer.model, trainer.optimizer, SIZE)
    with checkpoint.Checkpoints(self.workdir / 'checkpoints') as checkpoints:
      return checkpoints.restore(at, template)


def assert_same_run(ours, theirs):
  assert ours.rows() == theirs.rows()
  jax.tree.map(
    np.testing.assert_array_equal, ours.restore(12), theirs.restore(12)
  )
