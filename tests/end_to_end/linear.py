"""A command that trains a linear classifier in seconds, without TensorFlow.

Real processes run it. Only the data and the network differ from a real run.
"""

import dataclasses
import time

from absl import flags
import jax
import ml_collections
import orbax.checkpoint as ocp

from nfnet_jax import errors
from nfnet_jax.cli import command, common_flags, session
from nfnet_jax.distributed import collectives, processes
from nfnet_jax.experiments import train
from nfnet_jax.training import layouts, loop, state
from tests.training import linear_runs

for _name in ('workdir', *session.FLAGS):
  flags.declare_key_flag(_name)

TOTAL = 12
_SECONDS_PER_STEP = flags.DEFINE_float('seconds_per_step', 0, 'Slows training.')
_SECONDS_PER_EVAL_BATCH = flags.DEFINE_float(
  'seconds_per_eval_batch', 0, 'Slows evaluation.'
)
_SECONDS_PER_SAVE = flags.DEFINE_float('seconds_per_save', 0, 'Slows saving.')
_FAIL = flags.DEFINE_string('fail', '', 'PROCESS:STEP of bad data.')
_FAIL_EVAL = flags.DEFINE_integer(
  'fail_eval', None, 'Process whose evaluation has bad data.'
)
_SHARDED = flags.DEFINE_bool('sharded', False, 'Shards the update.')
_SEED = flags.DEFINE_integer('seed', 0, 'Only compared between processes.')


class Experiment:
  """The part of `config.experiment.Experiment` that `train.run` uses."""

  config = ml_collections.ConfigDict(
    {'batch_size': linear_runs.BATCH, 'run': {'keep_checkpoints': 99}}
  )
  cadence = loop.Cadence(TOTAL, log=1, evaluate=4.5, checkpoint=3)

  def __init__(self):
    self.trainer = linear_runs.make_trainer()

  def trainer_on(self, devices):
    if not _SHARDED.value:
      return self.trainer
    state = self.abstract_state()
    layout = layouts.shard_kernels(state, devices, min_size=1)
    assert layout.sharded == {'linear/w'}
    return dataclasses.replace(self.trainer, layout=layout)

  def create_state(self):
    assert processes.is_primary(), 'The other processes receive the state.'
    model, optimizer = self.trainer.model, self.trainer.optimizer
    return state.create_state(
      model, optimizer, seed=0, image_size=linear_runs.SIZE
    )

  def abstract_state(self):
    model, optimizer = self.trainer.model, self.trainer.optimizer
    return state.abstract_state(model, optimizer, linear_runs.SIZE)

  def train_batches(self, first, log_fn):
    del log_fn
    for batch in linear_runs.train_batches(first):
      time.sleep(_SECONDS_PER_STEP.value)
      if _FAIL.value == f'{jax.process_index()}:{batch["step"]}':
        raise errors.InputError('the record is bad.')
      yield local_part(batch)

  def eval_batches(self, log_fn):
    for batch in linear_runs.eval_batches():
      time.sleep(_SECONDS_PER_EVAL_BATCH.value)
      if _SECONDS_PER_EVAL_BATCH.value:
        log_fn('Evaluating ...')
      yield local_part(batch)
      if _FAIL_EVAL.value == jax.process_index():
        raise errors.InputError('the record is bad.')


def local_part(batch):
  """Return this process's examples."""
  size = linear_runs.BATCH // jax.process_count()
  mine = slice(jax.process_index() * size, (jax.process_index() + 1) * size)
  return {
    name: value[mine] if value.ndim else value for name, value in batch.items()
  }


def slow_down_saving():
  """Delay every checkpoint before it gets its final name."""
  finalize = ocp.PyTreeCheckpointHandler.finalize

  def slowly(handler, directory):
    command.log('Saving ...')
    time.sleep(_SECONDS_PER_SAVE.value)
    finalize(handler, directory)

  ocp.PyTreeCheckpointHandler.finalize = slowly


def main():
  if _SECONDS_PER_SAVE.value:
    slow_down_saving()
  with session.distributed_session() as log:
    collectives.assert_equal({'--seed': str(_SEED.value)})
    workdir = common_flags.get_workdir()
    with train.locked(workdir):
      return train.run(Experiment(), workdir, log)


if __name__ == '__main__':
  command.run(main)
