"""A door that trains a linear classifier in seconds, without TensorFlow.

Real processes run it: everything but the data and the network is the real run.
"""

import time

from absl import flags
import jax
import ml_collections
import orbax.checkpoint as ocp

from nfnet_jax import errors
from nfnet_jax.cli import command, common_flags, session
from nfnet_jax.distributed import collectives, environment, processes
from nfnet_jax.experiments import train
from nfnet_jax.training import loop, sharded_update, state
from tests.training import test_loop

for _name in ('workdir', *session.FLAGS):
  flags.declare_key_flag(_name)

TOTAL = 12
_SECONDS_A_STEP = flags.DEFINE_float('seconds_a_step', 0, 'Slows training.')
_SECONDS_A_TEST = flags.DEFINE_float('seconds_a_test', 0, 'Slows evaluation.')
_SECONDS_A_SAVE = flags.DEFINE_float('seconds_a_save', 0, 'Slows saving.')
_FAIL = flags.DEFINE_string('fail', '', 'PROCESS:STEP that has bad data.')
_SHARDED = flags.DEFINE_bool('sharded', False, 'Shards the update.')
_ODD = flags.DEFINE_integer('odd', -1, 'Process with another JAX.')
_DIFFERS = flags.DEFINE_integer('differs', -1, 'Process with another config.')


class Experiment:
  """What `train.run` asks of an `assemble.Experiment`."""

  config = ml_collections.ConfigDict(
    {'batch_size': test_loop.BATCH, 'run': {'keep_checkpoints': 99}}
  )
  cadence = loop.Cadence(TOTAL, log=1, evaluate=4.5, checkpoint=3)

  def __init__(self):
    self.trainer = test_loop.make_trainer()

  def sharded_trainer(self, devices):
    if not _SHARDED.value:
      return None
    trainer, like = self.trainer, self.abstract_state()
    sharded = sharded_update.ShardedTrainer(trainer, like, devices, min_size=1)
    assert sharded.sharded_paths == {'linear/w'}
    return sharded

  def create_state(self):
    assert processes.is_primary(), 'Others are given the state.'
    model, optimizer = self.trainer.model, self.trainer.optimizer
    return state.create_state(
      model, optimizer, seed=0, image_size=test_loop.SIZE
    )

  def abstract_state(self):
    model, optimizer = self.trainer.model, self.trainer.optimizer
    return state.abstract_state(model, optimizer, test_loop.SIZE)

  def train_batches(self, first, note):
    del note
    for batch in test_loop.train_batches(first):
      time.sleep(_SECONDS_A_STEP.value)
      if _FAIL.value == f'{jax.process_index()}:{batch["step"]}':
        raise errors.InputError('the record is bad.')
      yield part_of(batch)

  def eval_batches(self, note):
    for batch in test_loop.eval_batches():
      time.sleep(_SECONDS_A_TEST.value)
      if _SECONDS_A_TEST.value:
        note('Testing ...')
      yield part_of(batch)


def part_of(batch):
  """Cuts out this process's examples."""
  size = test_loop.BATCH // jax.process_count()
  mine = slice(jax.process_index() * size, (jax.process_index() + 1) * size)
  return {
    name: value[mine] if value.ndim else value for name, value in batch.items()
  }


def slow_down_saving():
  """Holds every checkpoint up before it gets its name."""
  finalize = ocp.PyTreeCheckpointHandler.finalize

  def slowly(handler, directory):
    command.log('Saving ...')
    time.sleep(_SECONDS_A_SAVE.value)
    finalize(handler, directory)

  ocp.PyTreeCheckpointHandler.finalize = slowly


def main():
  told = environment.describe()
  if _ODD.value >= 0 and _ODD.value == flags.FLAGS.process_id:
    told['jax'] = 'another'
  environment.describe = lambda: told
  if _SECONDS_A_SAVE.value:
    slow_down_saving()
  with session.distributed_session() as log:
    differs = _DIFFERS.value == jax.process_index()
    with errors.as_input_error():
      collectives.assert_equal({'seed': str(int(differs))})
    return train.run(Experiment(), common_flags.get_workdir(), log)


if __name__ == '__main__':
  command.run(main)
