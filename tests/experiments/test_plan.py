"""The command plan: what it compiles, checks and prints."""

import json

from absl import flags as flags_lib
import jax
import numpy as np
import pytest

from nfnet_jax.cli import command, config_flag
from nfnet_jax.config import resolve, steps
from nfnet_jax.data import known
from nfnet_jax.experiments import plan
from nfnet_jax.planning import compilation, plan_errors
from nfnet_jax.training import data_parallel
from tests.planning import compilers

flags_lib.declare_key_flag('config')  # For the command defined here.

PICO = [
  '--config=f0',
  '--config.model.name=nfnet_pico',
  '--config.batch_size=64',
  '--topology=v3:2x2',
]


def test_plan(run_command, lowering_compiler, tmp_path, monkeypatch):
  compiler = lowering_compiler
  monkeypatch.chdir(tmp_path)
  code, out, err = run_command(plan.main, *PICO)
  assert code == 0, err
  assert compiler.lowered == [('v3:2x2', (8, 8, 8, 8, 48), 'full')]
  assert 'Compiling nfnet_pico for v3:2x2, 8 images per core (full) ...' in err
  assert 'f0: nfnet_pico at 32 px, bfloat16' in out  # As on a TPU, not as here.
  assert '8 cores of 4 chips TPU v3, 2 hosts' in out
  assert '5.00 GiB of 15.48 GiB per core' in out
  assert '5.8 ms estimated (5.42 M cycles at 940 MHz)' in out
  assert '7,206,564 steps' in out  # 360 epochs of 1,281,167 images by 64.
  assert 'convolutions, stage 2' in out
  assert list(tmp_path.iterdir()) == []  # No figure without --out.


def test_search(run_command, compiler):
  flags = *PICO, '--search', '--quick', '--compare=128,v5e:2x4'
  code, out, err = run_command(plan.main, *flags)
  assert code == 0, err
  # Per variant: as it is, and each of four fast paths put on or off.
  assert len(compiler.lowered) == 3 * 5
  assert {effort for _, _, effort in compiler.lowered} == {'quick'}
  assert err.count(' M cycles (quick)') == 3 * 5
  _, *rows = out.partition('\n\n')[0].splitlines()
  assert len(rows) == 3 * 5
  # The steps take equally long, so the largest batch is the fastest.
  assert 'f0 128 v3:2x2: 1 microbatch; fast paths' in rows[0]
  assert 'fastest      --config.run.accumulate=1 --config.run.remat=F' in out
  flags = *PICO, '--search', '--quick', '--json'
  _, out, _ = run_command(plan.main, *flags)
  assert len(json.loads(out)['plans']) == 5


def test_search_in_vain(run_command, compiler):
  flags = *PICO, '--search', '--config.batch_size=512'
  code, out, err = run_command(plan.main, *flags)
  assert (code, out) == (2, '')
  assert 'nfnet_jax: No step fits, with any number of microbatches' in err
  assert 'lacks 17.52 GiB' in err


def test_model_flops_do_not_depend_on_fast_paths(run_command, compiler):
  rows = []
  for paths in 'fast_stem', 'none':
    flags = '--json', f'--config.run.fast_paths={paths}'
    rows.append(json.loads(run_command(plan.main, *PICO, *flags)[1]))
  sides = [images[2:] for _, images, _ in compiler.lowered]
  assert sides == [(8, 8, 48), (32, 32, 3)]
  name = 'model_flops_per_step'
  assert rows[0][name] == rows[1][name] > 0


def test_each_device_has_a_share_of_the_state_if_the_update_is_sharded(
  run_command, compiler
):
  rows = []
  for paths in 'shard_update', 'none':
    flags = '--json', f'--config.run.fast_paths={paths}'
    rows.append(json.loads(run_command(plan.main, *PICO, *flags)[1]))
  assert [row['shard_update'] for row in rows] == [True, False]
  whole = rows[0]['state_bytes']
  assert whole == rows[1]['state_bytes'] == rows[1]['state_bytes_per_device']
  # An eighth of the large kernels, and all of the rest.
  assert whole / 8 < rows[0]['state_bytes_per_device'] < whole / 2


def test_the_ascent_of_sam_has_its_own_microbatches(run_command, compiler):
  flags = '--json', '--config.run.accumulate=4', '--config.optimizer.sam_rho=.1'
  _, out, _ = run_command(plan.main, *PICO, *flags)
  # The compiler counts 2 of the 8 images per core, and 1 of SAM's 2.
  expected = 8 * 1e12 * (8 + 2) / (2 + 1)
  assert json.loads(out)['flops_per_step'] == pytest.approx(expected)


def test_settings_are_resolved_for_the_devices_of_the_pod(
  run_command, compiler, monkeypatch
):
  """The batch leads to 4 data shards, which 8 devices cannot share."""
  flags = [*PICO, '--config.batch_size=60']
  code, _, err = run_command(plan.main, *flags)
  assert code == 2
  assert 'not a positive multiple of the number of devices 8' in err
  compilers.provide(monkeypatch, jax.devices()[:4], hosts=1)
  code, _, err = run_command(plan.main, *flags)
  assert code == 0, err
  assert compiler.lowered[0][1][:2] == (4, 15)


def test_json_has_stable_names(run_command, compiler):
  code, out, _ = run_command(plan.main, *PICO, '--json', '--quick')
  row = json.loads(out)
  assert (code, row['effort'], compiler.lowered[0][2]) == (0, 'quick', 'quick')
  assert {
    'argument_bytes',
    'batch_per_device',
    'chip_hours',
    'collective_bytes',
    'compile_s',
    'cycles',
    'decoded_per_second_and_host',
    'devices',
    'epoch_minutes',
    'fits',
    'flops_per_step',
    'hosts',
    'fast_stem',
    'fused_blocks',
    'fast_convs',
    'images_per_second',
    'model_flops_utilisation',
    'parameter_bytes',
    'peak_bytes',
    'shard_update',
    'state_bytes',
    'state_bytes_per_device',
    'step_cycles',
    'step_ms',
    'total_hours',
    'total_steps',
  } <= set(row)


def test_a_batch_that_does_not_fit_leads_to_the_largest_that_does(
  run_command, compiler
):
  flags = [*PICO, '--config.batch_size=256', '--json']
  code, out, _ = run_command(plan.main, *flags)
  row = json.loads(out)
  assert (code, row['fits']) == (0, False)
  assert row['lacking_bytes'] == 17 * compilers.GIB - int(15.48 * compilers.GIB)
  # 28 images need 15 GiB, 29 need 15.5.
  assert row['largest_batch_per_device'] == 28
  assert row['largest_batch_size'] == 224
  assert row['tried_batch_per_device'] == [16, 28]
  assert row['largest_batch_settings'] == {}  # They follow from the batch.
  # The quick compilation needs the same memory.
  assert [each[2] for each in compiler.lowered] == ['full', 'quick', 'quick']
  assert compiler.lowered[-1][1] == (8, 28, 8, 8, 48)


@pytest.mark.parametrize(
  ('flags', 'suggested'),
  [
    pytest.param([], ['--config.batch_size=224'], marks=pytest.mark.slow),
    pytest.param(
      ['--config.data.shards=64'],
      ['--config.batch_size=224', '--config.data.shards=8'],
      marks=pytest.mark.slow,
    ),
    pytest.param(
      ['--config.data.shards=16'],
      ['--config.batch_size=224'],
      marks=pytest.mark.slow,
    ),
    pytest.param(
      ['--config.data.partners=in_batch'],
      ['--config.batch_size=224'],  # 16 shards of seven pairs.
      marks=pytest.mark.slow,
    ),
    pytest.param(
      ['--config.data.multiplicity=8'],
      ['--config.batch_size=192'],
      marks=pytest.mark.slow,
    ),
    (
      ['--config.run.accumulate=8', '--config.data.shards=8'],
      ['--config.batch_size=192'],
    ),
    # Groups of three examples, an even number of them.
    pytest.param(
      [
        '--config.batch_size=288',
        '--config.run.accumulate=2',
        '--config.data.multiplicity=3',
        '--config.data.shards=8',
      ],
      ['--config.batch_size=192'],
      marks=pytest.mark.slow,
    ),
  ],
)
def test_train_accepts_the_batch_that_is_suggested(
  run_command, compiler, flags, suggested
):
  flags = [*PICO, '--config.batch_size=256', *flags]
  code, out, err = run_command(plan.main, *flags)
  assert code == 0, err
  (line,) = [line for line in out.splitlines() if line.startswith('largest')]
  assert [word for word in line.split() if word[0] == '-'] == suggested
  # The plan's own checks are those of training.
  code, out, err = run_command(plan.main, *flags, *suggested)
  assert code == 0, err
  assert 'to spare' in out


def test_the_largest_batch_keeps_its_microbatches(
  run_command, compiler, monkeypatch
):
  """At most six images each: 32 need eight microbatches, and 24 need four."""
  images = {'nfnet_pico': 6}
  monkeypatch.setattr(resolve, '_IMAGES', {True: images, False: images})
  flags = [*PICO, '--config.run.remat=False']
  code, out, err = run_command(plan.main, *flags, '--config.batch_size=256')
  assert code == 0, err
  (line,) = [line for line in out.splitlines() if line.startswith('largest')]
  suggested = [word for word in line.split() if word[0] == '-']
  assert suggested == ['--config.batch_size=192', '--config.run.accumulate=8']
  code, out, err = run_command(plan.main, *flags, *suggested)
  assert code == 0, err
  assert 'to spare' in out


def test_compare(run_command, compiler, tmp_path):
  code, out, err = run_command(
    plan.main, *PICO, '--compare=v2:2x2', f'--out={tmp_path}/new'
  )
  assert code == 0, err
  rows = {line[:18].strip(): line[18:] for line in out.splitlines()}
  assert rows['available'].split()[::2] == ['15.48', '7.48']
  assert rows['fits'].split() == ['yes', 'yes']
  assert (tmp_path / 'new' / 'plan.png').is_file()
  assert (tmp_path / 'new' / 'collectives.png').is_file()


@pytest.mark.slow
def test_compare_changes_one_thing_at_a_time(run_command, compiler, tmp_path):
  out_dir = tmp_path / 'new'
  code, out, err = run_command(
    plan.main,
    *PICO,
    '--compare=128,v2:2x2,resnet:nf_resnet50,256,tpu7x:2x2x1',
    '--config.data.image_size=32',
    f'--out={out_dir}',
  )
  assert code == 0, err
  rows = {line[:18].strip(): line[18:] for line in out.splitlines()}
  assert rows['batch per device'].split() == ['8', '16', '8', '8', '32', '8']
  v3, v2 = '15.48', '7.48'
  assert rows['available'].split()[::2] == [v3, v3, v2, v3, v3, '94.75']
  # The command line's overrides apply to the other configs too.
  assert [each[1][2] for each in compiler.lowered[:4]] == [8] * 4
  assert rows['fits'].split() == ['yes', 'yes', 'yes', 'yes', 'no', 'yes']
  assert (out_dir / 'plan.png').is_file()
  assert not list(tmp_path.glob('*.png'))


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (
      ['--config=f0'],
      'The pod is missing. Give its topology: --topology=v3:8x8.',
    ),
    ([*PICO, '--topology=v9:2x2'], "Unknown TPU 'v9'"),
    ([*PICO, '--topology=v3'], "'v3' is not a topology"),
    (
      [*PICO, '--config.batch_size=100', '--config.data.shards=8'],
      'batch_size 100 is not a positive multiple of data.shards 8 (100 = 12 x '
      '8 + 4). Use --config.batch_size=96 or --config.batch_size=104.',
    ),
    (
      [*PICO, '--config.dataset=cifar10'],
      "number of classes of 'cifar10' is unknown. Give --num_classes=N",
    ),
    (
      [*PICO, '--config.dataset=cifar10', '--num_classes=10'],
      "examples of 'train' of 'cifar10' is unknown. Give --examples=N",
    ),
    (
      [*PICO, '--config.data.train_split=train[1shard:]'],
      "examples of 'train[1shard:]' of 'imagenet2012' is unknown",
    ),
    ([*PICO, '--out=/dev/null/plans'], "--out='/dev/null/plans': Not a dir"),
    ([*PICO, '--compare=f9'], "Unknown config 'f9'"),
    ([*PICO, '--compare=v3:2'], "'v3:2' is not a topology"),
    ([*PICO, '--compare=nf_regnet:b9'], "'b9' is not a variant"),
    ([*PICO, '--config.train_for=soon'], "'soon' is not a duration"),
    (
      [
        *PICO,
        '--config.train_for=1 example',
        '--config.optimizer.warmup=0 steps',
        '--compare=128',
      ],
      "'1 example' is less than one step",
    ),
  ],
)
def test_bad_input_is_one_line_before_compiling(
  run_command, compiler, flags, message
):
  code, out, err = run_command(plan.main, *flags)
  assert (code, out) == (2, '')
  (line,) = err.splitlines()
  assert line.startswith('nfnet_jax: ')
  assert message in line
  assert not compiler.lowered


def test_missing_libtpu_is_one_line(run_command, monkeypatch):
  find = plan_errors.importlib.util.find_spec
  monkeypatch.setattr(
    plan_errors.importlib.util,
    'find_spec',
    lambda name, *rest: None if name == 'libtpu' else find(name, *rest),
  )
  code, out, err = run_command(plan.main, *PICO)
  assert (code, out) == (2, '')
  (line,) = err.splitlines()
  assert 'TPU compiler is not installed' in line
  assert "pip install '.[plan]'" in line


def test_unknown_datasets_take_their_numbers_from_flags(run_command, compiler):
  flags = [*PICO, '--config.dataset=cifar10', '--num_classes=10', '--json']
  row = json.loads(run_command(plan.main, *flags, '--examples=50_000')[1])
  assert row['total_steps'] == 360 * 50_000 // 64
  # With durations in steps the number of examples is not needed.
  steps = ['--config.train_for=500 steps', '--config.optimizer.warmup=10 steps']
  row = json.loads(run_command(plan.main, *flags, *steps)[1])
  assert (row['total_steps'], row['epoch_minutes']) == (500, None)


def experiment(flags, run_command):
  seen = []
  result = run_command(lambda: seen.append(config_flag.get_config()), *flags)
  assert result[0] == 0, result
  return steps.open_experiment(seen[0])


def shapes(batch):
  return {name: (np.shape(x), np.asarray(x).dtype) for name, x in batch.items()}


@pytest.mark.parametrize(
  'extra',
  [
    ['--config.data.randaugment_layers=0', '--config.run.fast_paths=fast_stem'],
    *(
      pytest.param(extra, marks=pytest.mark.slow)
      for extra in (
        [],
        ['--config.run.fast_paths=fast_stem'],
        ['--config.data.randaugment_layers=0'],
        ['--config.data.mixup=False', '--config.data.cutmix=False'],
        ['--config.data.mixup=False', '--config.data.partners=in_batch'],
      )
    ),
  ],
)
def test_planned_shapes_equal_those_of_the_pipeline(
  run_command, small_recipe, extra
):
  run = experiment([*small_recipe, *extra], run_command)
  planned = {
    name: (each.shape, each.dtype) for name, each in run.train_shapes().items()
  }
  assert planned == shapes(next(run.train_batches(0, print)))


@pytest.mark.slow
def test_the_planned_program_equals_the_one_that_trains(run_command, small):
  """Lowering from shapes gives the same program as from arrays."""
  run = experiment(small, run_command)
  devices = data_parallel.DataParallel(jax.devices())
  trainer = run.trainer_on(len(jax.devices()))
  planned = devices.lower(trainer, run.abstract_state(), run.train_shapes())
  state = devices.shard_state(trainer.layout, run.create_state())
  batch = devices.shard_batch(next(run.train_batches(0, print)))
  real = devices.train_step(trainer).lower(state, batch)
  text = lambda lowered: compilation.replace_locations(
    lowered.as_text(debug_info=True)
  )
  assert text(planned) == text(real)


def test_known_numbers_equal_those_of_the_dataset(digits):
  facts = known.DATASETS['digits']
  assert facts.num_classes == digits.num_classes
  assert list(facts.splits) == digits.splits
  slices = '', '[100:]', '[-7:]', '[5:-9]', '[10%:]', '[:7%]', '[-33%:]'
  parts = [f'{name}{part}' for name in facts.splits for part in slices]
  for split in (*parts, 'train+test[5:]'):
    assert facts.num_examples(split) == digits.num_examples(split), split
  for split in ('nothing', 'train[:10 %]', 'train+nothing'):
    assert facts.num_examples(split) is None


@pytest.mark.parametrize(
  'name',
  [pytest.param('f0', marks=pytest.mark.slow), 'resnet:nf_resnet50'],
)
def test_a_config_has_the_name_that_was_given(run_command, compiler, name):
  flags = [f'--config={name}', *PICO[1:], '--config.data.image_size=32']
  code, out, err = run_command(plan.main, *flags, '--json')
  assert code == 0, err
  assert json.loads(out)['config'] == name


def test_progress_of_a_long_operation(capfd):
  with command.working('Compiling ...'):
    pass
  assert capfd.readouterr().err == 'Compiling ...\n'
  with pytest.raises(ValueError), command.working('Compiling ...'):
    raise ValueError
