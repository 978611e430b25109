"""Bad input: one line on stderr, exit code 2, before anything is compiled."""

import json

import jax
import pytest

from nfnet_jax.experiments import cli, evaluate, several, train
from nfnet_jax.training import parallel, processes


@pytest.fixture(autouse=True)
def no_compilation(monkeypatch):
  """Makes any attempt to build a step a failure."""

  def refuse(*args, **kwargs):
    raise AssertionError('compiled before the input was checked')

  monkeypatch.setattr(jax, 'pmap', refuse)


def complaint(result):
  code, out, err = result
  assert code == 2, err
  assert not out
  lines = err.strip().splitlines()
  assert len(lines) == 1, err
  assert lines[0].startswith('nfnet_jax: ')
  return lines[0]


@pytest.mark.parametrize(
  ('model', 'parts', 'said'),
  [
    ('nfnet_pico', 3, 'devices times run.accumulate 24 (64 = 2 x 24 + 16)'),
    ('nfnet_pico', 0, 'run.accumulate 0 is not in [1, inf)'),
    ('bn_resnet_pico', 2, "'bn_resnet_pico' normalises batches, and"),
  ],
)
def test_parts_that_cannot_be(door, tmp_path, model, parts, said):
  result = door(
    train.main,
    '--config=digits',
    f'--workdir={tmp_path}',
    f'--config.model.name={model}',
    '--config.model.stochdepth_rate=0.1',
    f'--config.run.accumulate={parts}',
  )
  assert said in complaint(result)


@pytest.mark.parametrize(
  ('model', 'size', 'said'),
  [
    ('nf_resnet_pico', 32, "for NFNets; 'nf_resnet_pico' has no such form"),
    ('nfnet_pico', 30, 'multiple of 4, not 30: leave it out, or take 28 or 32'),
  ],
)
def test_a_fast_stem_that_cannot_be(door, tmp_path, model, size, said):
  result = door(
    train.main,
    '--config=digits',
    f'--workdir={tmp_path}',
    f'--config.model.name={model}',
    f'--config.data.image_size={size}',
    '--config.run.fast_stem=True',
  )
  assert said in complaint(result)


def test_evaluate_takes_no_size(door):
  said = complaint(door(evaluate.main, '--weights=a.npz', '--size=64'))
  assert 'use --config.data.eval_size=64 in place of --size.' in said


def test_evaluate_takes_overrides_of_the_run(door, tmp_path):
  result = door(
    evaluate.main,
    f'--workdir={tmp_path}',
    '--config.run.eval_batch_size=8',
    on_a_run=True,
  )
  assert 'holds no run' in complaint(result)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--config=digit'], "Unknown config 'digit'. Did you mean 'digits'?"),
    (['--config=zzz'], 'Known: digits'),
    (['--config=/no/such.py'], "There is no config file '/no/such.py'"),
    ([], 'Give an experiment: --config=NAME. Known: digits'),
    (
      ['--config=digits', '--config.optimizer.learning_rte=1'],
      'Did you mean "learning_rate"',
    ),
    (
      ['--config=digits', '--config.optimzer.learning_rate=1'],
      'Did you mean "optimizer"',
    ),
    (
      ['--config=digits', '--config.batch_size=many'],
      '--config.batch_size=many: invalid literal for int()',
    ),
    (['--config=digits', '--wrokdir=x'], "Unknown command line flag 'wrokdir'"),
    (['--config=digits', 'extra'], "Unexpected argument 'extra'"),
    (
      ['--config=digits', '--config.batch_size=60'],
      'batch_size 60 is not a positive multiple of data.shards 8 '
      '(60 = 7 x 8 + 4). Use --config.batch_size=56 or --config.batch_size=64.',
    ),
    (
      ['--config=digits', '--config.batch_size=0'],
      'batch_size 0 is not in [1, inf)',
    ),
    (
      ['--config=digits', '--config.data.shards=12'],
      'data.shards 12 is not a positive multiple of the number of devices 8',
    ),
    (
      ['--config=digits', '--config.run.eval_batch_size=0'],
      'run.eval_batch_size 0 is not in [1, inf)',
    ),
    (
      ['--config=digits', '--config.data.train_split=train[:5]'],
      "data.train_split 'train[:5]' has 5 examples; it needs at least 8",
    ),
    (
      ['--config=digits', '--config.data.eval_split=test[:0]'],
      "data.eval_split 'test[:0]' has 0 examples; it needs at least 1",
    ),
    (
      ['--config=digits', '--config.data.shift=33'],
      'data.shift 33 is more than the image of 32 pixels',
    ),
    (
      ['--config=digits', '--config.dataset=mnist:9.9.9'],
      "TFDS knows no dataset 'mnist:9.9.9', or not in that version",
    ),
    (
      ['--config=digits', '--config.model.name=nfnet_f00'],
      "Unknown model 'nfnet_f00'; known: nfnet_f0",
    ),
    (
      ['--config=digits', '--config.train_for=3 weeks'],
      "'3 weeks' is not a duration; write '100 steps', '5 epochs' or",
    ),
    (
      ['--config=digits', '--config.train_for=10 examples'],
      "train_for '10 examples' is less than one step of 64 examples",
    ),
    (
      ['--config=digits', '--config.optimizer.warmup=soon'],
      "'soon' is not a duration",
    ),
    *(
      (
        ['--config=digits', f'--profile={steps}'],
        f"--profile='{steps}' is not START:STOP",
      )
      for steps in ('soon', '5', ':5', '5:', '-1:5', '1.5:5', '5:5', '7:5')
    ),
    (
      ['--config=digits', '--profile=600:676'],
      '--profile=600:676 goes past the end of the run, 675 steps.',
    ),
    (
      ['--config=digits', '--config.dataset=cifar10'],
      "Dataset 'cifar10' is not prepared under",
    ),
    (
      ['--config=digits', '--config.dataset=digitz'],
      "TFDS knows no dataset 'digitz'",
    ),
    (
      ['--config=digits', '--config.data.eval_split=validation'],
      "Dataset 'digits' has no split 'validation'; it has: train, test",
    ),
    (
      ['--config=digits', '--config.compute_dtype=float13'],
      "compute_dtype 'float13' is none of float32, bfloat16",
    ),
    (
      ['--config=digits', '--config.model.dropout_rate=1.5'],
      'model.dropout_rate 1.5 is not in [0, 1)',
    ),
    (
      ['--config=digits', '--config.optimizer.sam_rho=-0.05'],
      'optimizer.sam_rho -0.05 is not in [0, inf)',
    ),
    (
      ['--config=digits', '--config.optimizer.sam_rho=nan'],
      'optimizer.sam_rho nan is not in [0, inf)',
    ),
    (
      ['--config=digits', '--config.optimizer.sam_share=0'],
      'optimizer.sam_share 0.0 is not in (0, 1]',
    ),
    (
      ['--config=digits', '--config.optimizer.sam_share=20'],
      'optimizer.sam_share 20.0 is not in (0, 1]',
    ),
  ],
)
def test_train(door, data_dir, tmp_path, arguments, message):
  if any(argument == '--config=digits' for argument in arguments):
    arguments = [*arguments, f'--config.run.data_dir={data_dir}']
  workdir = tmp_path / 'run'
  result = door(train.main, *arguments, f'--workdir={workdir}')
  assert message in complaint(result)
  assert not workdir.exists()


def test_train_without_a_workdir(door):
  result = door(train.main, '--config=digits')
  assert '--workdir=DIR' in complaint(result)


@pytest.mark.parametrize(
  ('body', 'message'),
  [
    ('return 1 / 0', 'mine.py:3: ZeroDivisionError: division by zero'),
    ('return math.foo', "mine.py:3: AttributeError: module 'math' has no"),
    ('return ml_collections.ConfigDict({"model": {}})', 'too few'),
    ('c = digits.get_config(); c.optimizer.learning_rte = 5', 'learning_rate'),
  ],
)
def test_a_config_file_that_is_wrong(door, tmp_path, body, message):
  path = tmp_path / 'mine.py'
  imports = 'import math, ml_collections; '
  imports += 'from nfnet_jax.experiments.configs import digits'
  path.write_text(f'{imports}\ndef get_config():\n  {body}\n')
  result = door(train.main, f'--config={path}', f'--workdir={tmp_path}/run')
  assert message in complaint(result)


@pytest.mark.parametrize('name', ['{tmp}/file/run', 's3://bucket/run'])
def test_a_workdir_that_cannot_be_written(door, data_dir, tmp_path, name):
  (tmp_path / 'file').write_text('')
  workdir = name.format(tmp=tmp_path)
  data = f'--config.run.data_dir={data_dir}'
  code, _, err = door(
    train.main, '--config=digits', data, f'--workdir={workdir}'
  )
  assert code == 2
  assert 'file/run' in err or 's3://bucket/run' in err
  assert 'Traceback' not in err


def test_evaluate_without_a_run(door, tmp_path):
  result = door(evaluate.main, f'--workdir={tmp_path}', on_a_run=True)
  assert 'holds no run: there is no config.json in it' in complaint(result)


def test_evaluate_before_the_first_checkpoint(door, data_dir, tmp_path):
  from nfnet_jax.experiments import checks, config
  from nfnet_jax.experiments.configs import digits

  settings = digits.get_config()
  settings.run.data_dir = data_dir
  config.save(checks.resolve_and_check(settings), tmp_path, [])
  result = door(evaluate.main, f'--workdir={tmp_path}', on_a_run=True)
  assert 'holds no checkpoint yet' in complaint(result)


def test_configs_can_be_listed(door):
  code, out, err = door(train.main, '--list_configs')
  assert (code, err) == (0, '')
  assert out.startswith('digits ')
  assert 'NFNet-nano with AGC on the UCI handwritten digits.' in out


def test_a_config_may_take_an_argument(tmp_path, door):
  path = tmp_path / 'mine.py'
  path.write_text(
    'from nfnet_jax.experiments.configs import digits\n'
    'def get_config(size):\n'
    '  config = digits.get_config()\n'
    '  config.batch_size = int(size)\n'
    '  return config\n'
  )
  seen = []
  main = lambda: seen.append(cli.get_config().batch_size)
  assert door(main, f'--config={path}:24')[0] == 0
  assert door(main, '--config', f'{path}:40')[0] == 0
  assert seen == [24, 40]


def test_json_is_one_object_only(door):
  code, out, _ = door(lambda: print(json.dumps({'top1': 1.0})), '--json')
  assert (code, json.loads(out)) == (0, {'top1': 1.0})


@pytest.mark.parametrize('main', [train.main, evaluate.main])
def test_another_platform_than_the_required_is_refused(door, tmp_path, main):
  arguments = '--config=digits', f'--workdir={tmp_path}'
  line = complaint(door(main, *arguments, '--require_platform=tpu'))
  assert '--require_platform=tpu, but JAX found only cpu devices' in line
  assert not list(tmp_path.iterdir())


def test_gpus_of_any_make_are_what_slurm_asks_for(door, monkeypatch):
  """JAX calls the platform of CUDA and of ROCm `gpu`, too."""
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert door(enter, '--require_platform=gpu') == (0, '', '')
  line = complaint(door(enter, '--require_platform=cpu'))
  assert '--require_platform=cpu, but JAX found only gpu devices' in line


def enter():
  with several.together():
    pass


def test_other_processes_devices_are_no_ones_own(door, monkeypatch):
  """A host of a pod that was told to stay alone."""
  monkeypatch.setattr(jax, 'process_count', lambda: 4)
  line = complaint(door(enter, '--num_processes=1'))
  assert 'the devices of 4 processes here, which were not joined' in line


def test_devices_that_do_not_answer_are_counted(door, monkeypatch):
  monkeypatch.setattr(processes, 'are_several', lambda: True)
  monkeypatch.setattr(parallel.DataParallel, 'count', lambda self: 7)
  code, _, err = door(enter)
  assert code == 1
  assert err.startswith('nfnet_jax: 7 of 8 devices answered.')


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--num_processes=2'], 'need all of --coordinator=HOST:PORT'),
    (
      ['--coordinator=h:1', '--num_processes=2', '--process_id=2'],
      '--process_id=2 is not in [0, 2)',
    ),
    (
      ['--coordinator=host0', '--num_processes=2', '--process_id=0'],
      '--coordinator=host0 is not HOST:PORT',
    ),
    (['--require_platform=gpus'], 'should be one of <tpu|gpu|cpu>'),
  ],
)
def test_processes_that_cannot_be(door, tmp_path, flags, message):
  arguments = '--config=digits', f'--workdir={tmp_path}'
  assert message in complaint(door(train.main, *arguments, *flags))
