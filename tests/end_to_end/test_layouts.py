"""The real training run on several layouts of eight devices."""

import json
import signal
import time

import pytest

from tests.end_to_end import process_groups

EVALUATE = 'nfnet_jax.experiments.evaluate'


def assert_close(rows, others):
  assert len(rows) == len(others) > 10
  for row, other in zip(rows, others):
    assert row == pytest.approx(other, rel=1e-5, abs=1e-7)


@pytest.fixture
def arguments(small):
  return [
    *small,
    '--config.train_for=10 steps',
    '--config.run.eval_every=5 steps',
    '--config.run.checkpoint_every=5 steps',
  ]


def run(count, *arguments, module=process_groups.TRAIN, **options):
  group = process_groups.ProcessGroup(
    module, *arguments, count=count, devices=8 // count, **options
  )
  assert group.finish() == [0] * count, group.output
  return group


@pytest.mark.full
def test_ten_steps_are_equal_on_every_layout(arguments, tmp_path):
  """The first layout builds the dataset with several processes."""
  rows = {}
  for count in (4, 2, 1):
    workdir = tmp_path / str(count)
    sharded = '--config.run.fast_paths=' + (
      'fused_blocks,shard_update' if count == 2 else 'fused_blocks'
    )
    group = run(count, *arguments, sharded, f'--workdir={workdir}')
    rows[count] = process_groups.rows_of(workdir)
    for index, process in enumerate(group):
      here = f'{8 // count} of them here' if count > 1 else 'process 0 of 1'
      lines = [f'devices    8 x cpu (cpu), {here}']
      if count > 1:
        lines.insert(0, f'process    {index} of {count}')
      assert set(lines) <= set(process.lines)
      assert index == 0 or process.lines == lines
  assert_close(rows[4], rows[1])
  assert_close(rows[2], rows[1])
  # Evaluation on another layout, where only process 0 sees the workdir.
  workdir = f'--workdir={tmp_path / "1"}'
  unseen = {'arguments': [f'--workdir={tmp_path / "unseen"}']}
  first, second = run(2, workdir, '--json', module=EVALUATE, of_1=unseen)
  (line,) = [line for line in first.lines if line.startswith('{')]
  result = json.loads(line)
  assert result['examples'] == rows[1][-1]['eval/examples']
  for name in ('loss', 'top1', 'top5'):
    assert result[name] == pytest.approx(rows[1][-1][f'eval/{name}'], rel=1e-5)
  assert second.lines == ['process    1 of 2']


@pytest.mark.full
def test_run_resumes_on_another_layout(arguments, tmp_path):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  run(1, *arguments, f'--workdir={whole}')
  group = process_groups.ProcessGroup(
    process_groups.TRAIN, *arguments, f'--workdir={parts}', count=2, devices=4
  )
  while 5 not in process_groups.checkpoints_of(parts):
    time.sleep(0.01)
  group[0].send(signal.SIGKILL)
  group.finish()
  first, *_ = run(4, *arguments, f'--workdir={parts}')
  assert 'Resuming after step 5.' in first.output
  assert_close(process_groups.rows_of(parts), process_groups.rows_of(whole))
