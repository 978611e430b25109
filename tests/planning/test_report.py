"""The numbers and texts of a plan, from given cycles, bytes and pod."""

import dataclasses
import json

import pytest

from nfnet_jax.planning import estimate, figures, report
from tests.planning.plans import FAST_PATHS, make


def test_numbers_by_hand():
  row = make().numbers()
  assert row['batch_per_device'] == 32
  assert row['chips'] == 64
  assert row['peak_bytes'] == 13 * 2**30  # 9 + 8 - 7 + 2 + 1
  assert (row['argument_bytes'], row['temp_bytes']) == (9 * 2**30, 2 * 2**30)
  assert row['available_bytes'] == int(15.48 * 2**30)
  assert row['step_ms'] == pytest.approx(60)  # 56.4 M cycles at 940 MHz
  assert row['images_per_second'] == pytest.approx(4096 / 0.06)
  assert row['flops_per_step'] == 1.3e12 * 128
  assert (row['accumulate'], row['remat']) == (1, False)
  assert row['model_flops_per_step'] == 6 * 6.98e9 * 4096
  # 32 images per core: 1.34 TFLOP in 60 ms, of 61.5 TFLOP/s.
  assert row['model_flops_utilisation'] == pytest.approx(0.3632, abs=1e-4)
  assert row['epoch_minutes'] == pytest.approx(1_281_167 / 4096 * 0.06 / 60)
  assert row['total_hours'] == pytest.approx(112_602 * 0.06 / 3600)
  assert row['chip_hours'] == pytest.approx(64 * row['total_hours'])
  # Two are decoded for each of 68,267 images/s, by 16 hosts.
  assert row['decoded_per_second_and_host'] == pytest.approx(8533.3, abs=0.1)
  # 2 GB over four links of 82 GB/s.
  assert row['collective_ms_by_bandwidth'] == pytest.approx(6.098, abs=1e-3)
  assert row['cycles']['convolutions, stem'] == {
    'forward': 10_000_000,
    'backward': 30_000_000,
  }
  json.dumps(row)


def test_summary():
  text = report.summary(make())
  for part in (
    '128 cores of 64 chips TPU v3, 16 hosts',
    '32 per core',
    'fast paths   none\n',
    'state        768.0 MiB per core, of which parameters 256.0 MiB\n',
    '13.00 GiB of 15.48 GiB per core: 2.48 GiB to spare; arguments 9.00 GiB, '
    'temporary 2.00 GiB\n',
    '60.0 ms estimated (56.40 M cycles at 940 MHz)',
    'utilisation 36.3%',
    'not from the compiler',
    '8,533 decoded images/s per host (2 per training image)',
    '0.31 minutes per epoch, 112,602 steps in 1.9 hours, 120 chip-hours',
    'nothing ran',
  ):
    assert part in text
  assert 'pessimistic' not in text


def test_description_of_the_estimate():
  quick = report.summary(make(effort='quick'))
  assert 'quick: memory as in training, cycles pessimistic' in quick
  costs = dataclasses.replace(make().schedule, unknown_loops=2)
  assert '2 loops of unknown length' in report.summary(make(schedule=costs))
  costs = dataclasses.replace(make().schedule, not_estimated=3)
  text = report.summary(make(schedule=costs))
  assert 'no cycles for 3 operations, which count as 0' in text
  other = report.summary(make('v5e:8x16', 128, 32))
  assert 'no step was measured on TPU v5e' in other
  assert 'no step was measured' not in report.summary(make())


def test_without_a_known_clock_there_are_only_cycles():
  plan = make('v6e:8x16', 128, 32)
  row, text = plan.numbers(), report.summary(plan)
  assert row['step_cycles'] == 56_400_000
  assert row['step_ms'] is row['chip_hours'] is None
  assert "56.40 M cycles; this TPU's clock is not known" in text
  assert 'hours' not in text


def test_without_a_known_epoch_the_schedule_is_in_steps():
  work = dataclasses.replace(make().workload, examples=None)
  plan = make(workload=work)
  assert plan.numbers()['epoch_minutes'] is None
  assert 'schedule     112,602 steps in 1.9 hours' in report.summary(plan)


def too_large(largest):
  shortage = estimate.Shortage(20 * 2**30, largest, [16, 24])
  return make(compiled=None, schedule=None, shortage=shortage)


def test_a_plan_that_does_not_fit():
  plan = too_large(largest=24)
  row, text = plan.numbers(), report.summary(plan)
  assert row['fits'] is False
  assert row['lacking_bytes'] == 20 * 2**30 - int(15.48 * 2**30)
  assert 'does not fit by 4.52 GiB' in text
  assert '24 per core fit: --config.batch_size=3072 (compiled: 16, 24)' in text
  assert 'step ' not in text
  other = dataclasses.replace(plan.shortage, settings={'data.shards': 128})
  text = report.summary(dataclasses.replace(plan, shortage=other))
  assert '=3072 --config.data.shards=128 (compiled' in text
  assert 'no smaller batch that fits' in report.summary(too_large(largest=0))


def test_comparison():
  text = report.comparison([make(), too_large(24), make('v6e:8x16', 128, 32)])
  rows = {line[:18].strip(): line[18:].split() for line in text.splitlines()}
  assert rows['fits'] == ['yes', 'no', 'yes']
  assert rows['step ms'] == ['60.0', '-', '-']
  assert rows['largest batch'] == ['-', '3,072', '-']
  assert rows['hosts'] == ['16', '16', '32']


def test_breakdown_adds_up():
  lines = report.breakdown(make().schedule).splitlines()
  assert lines[1].split()[2:6] == ['10.00', '30.00', '70.9%', '#' * 24]
  assert lines[2].split()[1:5] == ['16.40', '0.00', '29.1%', '#' * 10]


def test_chart(tmp_path):
  path = tmp_path / 'plan.png'
  figures.draw_cycles(
    [make(), too_large(24), make(pod='v3:4x4', devices=32)], path
  )
  assert path.read_bytes().startswith(b'\x89PNG')
  assert list(tmp_path.iterdir()) == [path]
  figures.draw_cycles([too_large(24)], path)  # An empty chart is no error.


def test_chart_of_collectives(tmp_path):
  path = tmp_path / 'collectives.png'
  unknown = make('v6e:8x16', 128, 32)
  assert not figures.draw_collectives([too_large(24), unknown], path)
  assert not list(tmp_path.iterdir())
  assert figures.draw_collectives([make(), too_large(24), unknown], path)
  assert path.read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
  ('number', 'text'),
  [(2**30, '1.00 GiB'), (2**30 - 1, '1024.0 MiB'), (3 * 2**20, '3.0 MiB')],
)
def test_sizes(number, text):
  assert report.size(number) == text


def test_microbatches_and_recomputed_blocks():
  plan = make()
  work = dataclasses.replace(plan.workload, microbatches=4, remat=True)
  plan = dataclasses.replace(plan, workload=work)
  # The compiler counts one of the four.
  assert plan.numbers()['flops_per_step'] == 4 * 1.3e12 * 128
  line = 'batch        4,096: 32 per core, 4 microbatches, blocks recomputed\n'
  assert line in report.summary(plan)


@pytest.mark.parametrize(
  ('microbatches', 'sam_examples', 'counted'),
  [
    # The 32 images per core, and those of the ascent of SAM.
    (1, 6, 32 + 6),
    (4, 8, 32 / 4 + 8 / 4),
    (4, 6, 32 / 4 + 6 / 2),
    (4, 7, 32 / 4 + 7),
  ],
)
def test_the_ascent_of_sam_has_its_own_microbatches(
  microbatches, sam_examples, counted
):
  plan = make()
  work = dataclasses.replace(
    plan.workload, microbatches=microbatches, sam_examples=sam_examples
  )
  plan = dataclasses.replace(plan, workload=work)
  expected = (32 + sam_examples) / counted * 1.3e12 * 128
  assert plan.numbers()['flops_per_step'] == pytest.approx(expected)


def test_fast_paths_and_sharded_state():
  plan = make()
  work = dataclasses.replace(
    plan.workload,
    fast_paths=('fast_stem', 'shard_update'),
    state_bytes_per_device=2**27,
  )
  fast = dataclasses.replace(plan, workload=work)
  row = fast.numbers()
  used = [name for name in FAST_PATHS if row[name]]
  assert used == ['fast_stem', 'shard_update']
  assert row['state_bytes'] == 6 * row['state_bytes_per_device'] == 6 * 2**27
  text = report.summary(fast)
  assert 'fast paths   fast stem, sharded update\n' in text
  line = (
    'state        768.0 MiB in total, of which parameters 256.0 MiB; '
    '128.0 MiB per core\n'
  )
  assert line in text
  lines = report.comparison([plan, fast]).splitlines()
  rows = {line[:18].strip(): line[18:].split() for line in lines}
  assert rows['fast stem'] == rows['sharded update'] == ['no', 'yes']
  assert rows['fused blocks'] == rows['blocks recomputed'] == ['no', 'no']
  assert rows['state per device'] == ['768.0', 'MiB', '128.0', 'MiB']
