"""The command check: what it accepts, refuses and estimates."""

import importlib.util
import json

import jax
import pytest

from nfnet_jax.experiments import check
from tests.planning import compilers

PICO = [
  '--config=f0',
  '--config.model.name=nfnet_pico',
  '--config.batch_size=64',
  '--accelerator_type=v3-8',
]


def hide_libtpu(monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name, *rest: None if name == 'libtpu' else find(name, *rest),
  )


@pytest.fixture
def compiler(compiler, monkeypatch):
  """A compiler that is there with and without libtpu."""
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name, *rest: 'here' if name == 'libtpu' else find(name, *rest),
  )
  return compiler


def test_prints_the_plan_and_the_cost(run_command, compiler):
  flags = [*PICO, '--price_per_chip_hour=1.5', '--require_platform=tpu']
  code, out, err = run_command(check.main, *flags)
  assert code == 0, err
  assert 'valid for v3-8: batch 64, 8 per device' in err
  assert compiler.lowered == [('v3:2x2', (8, 8, 8, 8, 48), 'full')]
  assert '5.00 GiB of 15.48 GiB per core' in out
  assert 'chip-hours' in out
  assert 'convolutions' not in out
  assert 'cost' in out


@pytest.mark.slow
def test_json_has_the_cost(run_command, compiler):
  flags = [*PICO, '--price_per_chip_hour=1.5', '--json']
  _, out, _ = run_command(check.main, *flags)
  row = json.loads(out)
  assert row['cost'] == pytest.approx(1.5 * row['chip_hours'])
  assert (row['accelerator_type'], row['devices']) == ('v3-8', 8)


@pytest.mark.slow
def test_prints_no_cost_without_a_price(run_command, compiler):
  code, out, _ = run_command(check.main, *PICO)
  assert code == 0
  assert 'cost' not in out


@pytest.mark.slow
def test_prints_no_cost_where_the_clock_is_unknown(
  run_command, compiler, monkeypatch
):
  compilers.provide(monkeypatch, jax.devices()[:8], hosts=2)
  flags = '--accelerator_type=v6e-8', '--price_per_chip_hour=1'
  code, out, err = run_command(check.main, *PICO, *flags)
  assert code == 0, err
  assert "this TPU's clock is not known" in out
  assert 'cost' not in out


def test_a_share_is_held_out(run_command, compiler):
  flags = '--config.data.eval_split=10%', '--json'
  _, whole, _ = run_command(check.main, *PICO, flags[1])
  code, part, err = run_command(check.main, *PICO, *flags)
  assert code == 0, err
  whole, part = (json.loads(out)['epoch_minutes'] for out in (whole, part))
  assert part == pytest.approx(0.9 * whole, rel=1e-5)


def test_step_that_does_not_fit_is_refused(run_command, compiler):
  flags = [*PICO, '--config.batch_size=256', '--price_per_chip_hour=1']
  code, out, err = run_command(check.main, *flags)
  assert code == 2
  assert '28 per core fit: --config.batch_size=224' in out
  last = err.splitlines()[-1]
  assert "'f0' does not fit into the memory of v3-8: 1.52 GiB per core" in last


@pytest.mark.parametrize(
  ('flags', 'reason'),
  [
    (['--noplan'], '--noplan'),
    (['--config.dataset=cifar10'], "size of 'cifar10', split 'train', is not"),
    (['--config.data.train_split=train[1shard:]'], "split 'train[1shard:]'"),
    (
      ['--accelerator_type=v5litepod-1', '--config.batch_size=8'],
      'the layout of v5litepod-1 is not known',
    ),
  ],
)
def test_plan_is_left_out_with_a_reason(run_command, compiler, flags, reason):
  code, out, err = run_command(check.main, *PICO, *flags)
  assert (code, out) == (0, ''), err
  valid, left_out = err.splitlines()
  assert 'The flags are valid' in valid
  assert 'Memory, time and cost were not estimated' in left_out
  assert reason in left_out
  assert not compiler.lowered


def test_plan_is_left_out_without_libtpu(run_command, monkeypatch):
  hide_libtpu(monkeypatch)
  code, out, err = run_command(check.main, *PICO, '--json')
  assert code == 0, err
  assert 'libtpu is missing' in err
  assert json.loads(out) == {
    'accelerator_type': 'v3-8',
    'devices': 8,
    'batch_size': 64,
    'batch_per_device': 8,
    'accumulate': 1,
    'remat': False,
    'cost': None,
  }


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--config=f33'], "Unknown config 'f33'. Did you mean 'f3'?"),
    ([*PICO, '--config.batch_sze=8'], "Unknown setting 'batch_sze'"),
    ([*PICO, '--config.train_for=soon'], "'soon' is not a duration"),
    ([*PICO, '--config.optimizer.warmup=9999 epochs'], 'is longer than train'),
    ([*PICO, '--profle=1:2'], "Unknown command line flag 'profle'"),
    ([*PICO, '--profile=2:1'], 'not START:STOP'),
    ([*PICO, '--profile=1:99999999'], 'past the end of the run'),
    (
      [*PICO, '--config.batch_size=100', '--config.data.shards=8'],
      'batch_size 100 is not a positive multiple',
    ),
    (
      [*PICO, '--accelerator_type=v3-32', '--config.batch_size=60'],
      'the number of devices 32',
    ),
    (
      [*PICO, '--config.dataset=cifar10', '--config.batch_size=60'],
      'the number of devices 8',
    ),
    (PICO[:-1], 'The TPU is missing'),
    ([*PICO, '--accelerator_type=v7x-8'], "'v7x-8' is not an accelerator"),
    ([*PICO, '--accelerator_type=v3-7'], 'Give an even number of cores'),
    (PICO[-1:], 'Give an experiment: --config=NAME'),
    ([*PICO, '--price_per_chip_hour=cheap'], 'price_per_chip_hour'),
  ],
)
def test_bad_input_is_one_line_before_compiling(
  run_command, compiler, flags, message
):
  code, out, err = run_command(check.main, *flags)
  assert (code, out) == (2, '')
  (line,) = err.splitlines()
  assert message in line
  assert not compiler.lowered


@pytest.mark.parametrize(
  ('accelerator', 'expected'),
  [('v3-8', (2, False)), ('v4-16', (1, False)), ('v3-2', (4, False))],
)
def test_microbatches_follow_the_tpu(run_command, accelerator, expected):
  devices = {'v3-8': 8, 'v4-16': 8, 'v3-2': 2}[accelerator]
  code, out, err = run_command(
    check.main,
    '--config=f5',
    f'--config.batch_size={32 * devices}',
    f'--accelerator_type={accelerator}',
    '--noplan',
    '--json',
  )
  assert code == 0, err
  row = json.loads(out)
  assert (row['accumulate'], row['remat']) == expected


def test_batch_that_follows_from_the_dataset(run_command):
  code, out, err = run_command(
    check.main,
    '--config=finetune:small',
    '--config.model.name=nfnet_pico',
    '--config.dataset=imagenet2012',
    '--accelerator_type=v3-8',
    '--noplan',
    '--json',
  )
  assert code == 0, err
  assert json.loads(out)['batch_per_device'] == 8
