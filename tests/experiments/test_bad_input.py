"""Bad input gives one line and exit code 2 before anything is compiled."""

import errno
import json
import os
import subprocess
import sys

from absl import flags as flags_lib
import jax
from PIL import Image
import pytest

from nfnet_jax.cli import config_flag, session
from nfnet_jax.config import base, steps
from nfnet_jax.config import workdir as workdir_lib
from nfnet_jax.distributed import processes
from nfnet_jax.experiments import convert, evaluate, models, plan, train
from nfnet_jax.storage import failures, files
from nfnet_jax.training import data_parallel

# For the commands defined here.
for _name in ('config', 'json', *session.FLAGS):
  flags_lib.declare_key_flag(_name)


@pytest.fixture(autouse=True)
def no_compilation(monkeypatch):
  """Let any attempt to build a step fail."""

  def refuse(*args, **kwargs):
    raise AssertionError('compiled before the input was checked')

  monkeypatch.setattr(jax, 'pmap', refuse)


def error_line(result):
  code, out, err = result
  assert code == 2, err
  assert not out
  lines = err.strip().splitlines()
  assert len(lines) == 1, err
  assert lines[0].startswith('nfnet_jax: ')
  return lines[0]


@pytest.mark.parametrize(
  ('model', 'count', 'message'),
  [
    ('nfnet_pico', 3, 'devices times run.accumulate 24 (64 = 2 x 24 + 16)'),
    ('nfnet_pico', 0, 'run.accumulate 0 is not in [1, inf)'),
    ('bn_resnet_pico', 2, "'bn_resnet_pico' normalises batches, and"),
  ],
)
def test_impossible_microbatches(run_command, tmp_path, model, count, message):
  result = run_command(
    train.main,
    '--config=digits',
    f'--workdir={tmp_path}',
    f'--config.model.name={model}',
    '--config.model.stochdepth_rate=0.1',
    f'--config.run.accumulate={count}',
  )
  assert message in error_line(result)


@pytest.mark.parametrize(
  ('model', 'size', 'message'),
  [
    (
      'nf_resnet_pico',
      32,
      "fast_stem is for other models; 'nf_resnet_pico' has no such path",
    ),
    (
      'nfnet_pico',
      30,
      'multiple of 4, such as 28 or 32, not 30. Leave fast_stem out.',
    ),
  ],
)
def test_an_impossible_fast_stem(run_command, tmp_path, model, size, message):
  result = run_command(
    train.main,
    '--config=digits',
    f'--workdir={tmp_path}',
    f'--config.model.name={model}',
    f'--config.data.image_size={size}',
    '--config.run.fast_paths=fast_stem',
  )
  assert message in error_line(result)


def test_a_fast_path_that_an_activation_rules_out(run_command, tmp_path):
  result = run_command(
    train.main,
    '--config=digits',
    f'--workdir={tmp_path}',
    '--config.model.activation=log_softmax',
    '--config.run.fast_paths=fused_blocks',
  )
  assert "model.activation 'log_softmax' works across channels" in error_line(
    result
  )


@pytest.mark.parametrize(
  ('module', 'arguments', 'message'),
  [
    (
      train,
      ['--config=f0', '--workdir=w', '--weights=F0_haiku.npz'],
      'train takes no --weights: use --config.weights=F0_haiku.npz.',
    ),
    (
      train,
      ['--config=f0', '--workdir=w', '--data_dir=sets'],
      'train takes no --data_dir: use --config.run.data_dir=sets.',
    ),
    (
      evaluate,
      ['--workdir=w', '--timm_forward'],
      'evaluate takes no --timm_forward: use --config.model.timm_forward=True.',
    ),
    (
      evaluate,
      ['--weights=a.npz', '--size=64'],
      'evaluate takes no --size: use --config.data.image_size=64 or '
      '--config.data.eval_size=64.',
    ),
    (models, ['--size=7'], 'models takes no --size; it takes --json.'),
    (models, ['--list_configs'], 'models takes no --list_configs; it takes'),
    (
      convert,
      ['--config=digits', '--config.batch_size=8', '--to=a.npz'],
      'convert takes no --config; it takes --layout, --size, --timm_forward, '
      '--to, --weights.',
    ),
  ],
)
def test_flags_of_other_commands_are_refused(
  run_command, module, arguments, message
):
  assert message in error_line(run_command(module.main, *arguments))


@pytest.mark.parametrize(
  ('name', 'arguments', 'message'),
  [
    ('models', ['nfnet_pico', '--workdir=/none'], 'models takes no --workdir;'),
    pytest.param(
      'train',
      ['--profile=1:2', '--to=a'],
      'it takes --config, --coordinator,',
      marks=pytest.mark.slow,
    ),
  ],
)
def test_a_command_run_as_a_script_refuses_them_too(name, arguments, message):
  """As processes, in which the command is `__main__`."""
  command = [sys.executable, '-m', f'nfnet_jax.experiments.{name}', *arguments]
  run = subprocess.run(command, capture_output=True, text=True)
  assert message in error_line((run.returncode, run.stdout, run.stderr))


def test_evaluate_takes_overrides_of_the_run(run_command, tmp_path):
  result = run_command(
    evaluate.main,
    f'--workdir={tmp_path}',
    '--config.run.eval_batch_size=8',
    on_a_run=True,
  )
  assert 'holds no run' in error_line(result)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--config=digit'], "Unknown config 'digit'. Did you mean 'digits'?"),
    (['--config=zzz'], 'Known: digits'),
    (['--config=x.yaml'], "The config 'x.yaml' is not a Python file."),
    (['--config=configs/'], "The config 'configs/' is not a Python file."),
    (['--config=/no/such.py'], "There is no config file '/no/such.py'"),
    ([], 'Give an experiment: --config=NAME. Known: digits'),
    (
      ['--config=digits', '--config.optimizer.learning_rte=1'],
      "Unknown setting 'optimizer.learning_rte'. Did you mean "
      "'optimizer.learning_rate'?",
    ),
    (
      ['--config=digits', '--config.optimzer.learning_rate=1'],
      "'optimzer.learning_rate'. Use --config.optimizer.learning_rate=1.",
    ),
    (
      ['--config=digits', '--config.batch_size=many'],
      '--config.batch_size=many: invalid literal for int()',
    ),
    (['--config=digits', '--wrokdir=x'], "Unknown command line flag 'wrokdir'"),
    (['--config=digits', '--lr=1'], 'Use --config.optimizer.learning_rate=1.'),
    (['--config=digits', '--epochs=9'], "Use --config.train_for='90 epochs'."),
    (['--config=digits', '--batch_size=9'], 'se --config.batch_size=9.'),
    (
      ['--config=digits', '--config.optimizer.lr=1'],
      "Unknown setting 'optimizer.lr'. Use --config.optimizer.learning_rate=1.",
    ),
    (
      ['--config=digits', '--config.run.fast_stem=True'],
      "Unknown setting 'run.fast_stem'. Use --config.run.fast_paths=LIST",
    ),
    (
      ['--config=digits', '--config.optimizer.zzz=1'],
      "Unknown setting 'optimizer.zzz'. --print_config lists all settings.",
    ),
    (['--config=digits:x'], "The config 'digits' takes no argument"),
    (['--config=f3:x'], "The config 'f3' takes no argument"),
    (
      ['--config=digits', '--config.run.fast_paths=auto,fast_convs'],
      "run.fast_paths: 'auto' stands alone. Leave the other names out.",
    ),
    (
      ['--config=digits', '--config.run.fast_paths=fast_stm'],
      "run.fast_paths has no path 'fast_stm'. Did you mean 'fast_stem'?",
    ),
    (
      ['--config=digits', '--config.optimizer.clip_by=units'],
      "optimizer.clip_by 'units' is none of",
    ),
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
      ['--config=digits', '--config.data.shards=0'],
      'data.shards 0 is not in [1, inf)',
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
      ['--config=digits', '--config.data.train_split=train[:40]'],
      "batch_size 64 is more than the 40 images of data.train_split 'train[:40"
      "]'. Use --config.batch_size=40 or less.",
    ),
    (
      ['--config=digits', '--config.optimizer.warmup=90 epochs'],
      "optimizer.warmup '90 epochs' is longer than train_for '30 epochs'.",
    ),
    (
      ['--config=digits', '--config.data.eval_split=test[:200%]'],
      "no split 'test[:200%]'; it has: train, test. A slice ends within its",
    ),
    (
      ['--config=digits', '--config.data.train_split=training'],
      'Name another with --config.data.train_split=SPLIT.',
    ),
    (
      ['--config=digits', '--config.data.eval_split=120%'],
      "data.eval_split '120%' is not a share from 1% to 99%",
    ),
    (
      ['--config=digits', '--config.data.shift=33'],
      'data.shift 33 is more than the image size of 32 pixels',
    ),
    (
      ['--config=digits', '--config.dataset=mnist:9.9.9'],
      "TFDS knows no dataset 'mnist:9.9.9', or not in that version",
    ),
    (
      ['--config=digits', '--config.model.name=nfnet_f00'],
      "Unknown model 'nfnet_f00'. Did you mean nfnet_f0",
    ),
    (
      ['--config=digits', '--config.train_for=3 weeks'],
      "'3 weeks' is not a duration; write '100 steps', '5 epochs' or",
    ),
    (
      ['--config=digits', '--config.train_for=10 examples'],
      "train_for '10 examples' is less than one step of 64 examples",
    ),
    *(
      (
        ['--config=digits', f'--config.optimizer.decay_every={duration}'],
        f"decay_every '{duration}' is less than one step of 64 examples",
      )
      for duration in ('0 steps', '0 epochs', '10 examples')
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
      "Dataset 'digits' has no split 'validation'; it has: train, test. Name "
      'another with --config.data.eval_split=SPLIT, or hold out a share of the '
      'training split with --config.data.eval_split=10%.',
    ),
    (
      ['--config=digits', '--config.compute_dtype=float13'],
      "compute_dtype 'float13' is none of auto, float32, bfloat16",
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
def test_train(run_command, data_dir, tmp_path, arguments, message):
  if any(argument == '--config=digits' for argument in arguments):
    arguments = [*arguments, f'--config.run.data_dir={data_dir}']
  workdir = tmp_path / 'run'
  result = run_command(train.main, *arguments, f'--workdir={workdir}')
  assert message in error_line(result)
  assert not workdir.exists()


def test_unreadable_images_of_a_folder(run_command, tmp_path):
  for index in range(16):
    path = tmp_path / 'photos' / 'ab'[index % 2] / f'{index}.jpg'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('no image')
    if index > 1:
      Image.new('RGB', (8, 8)).save(path)
  flags = [
    '--config=digits',
    f'--config.dataset={tmp_path}/photos',
    '--config.data.eval_split=25%',
    '--config.batch_size=8',
  ]
  result = run_command(train.main, *flags, f'--workdir={tmp_path}/run')
  line = error_line(result)
  assert '2 of 16 images cannot be read' in line
  assert 'a/0.jpg' in line
  assert line.endswith('--config.run.max_bad_records=2.')
  assert not (tmp_path / 'run').exists()


def test_train_without_a_workdir(run_command):
  result = run_command(train.main, '--config=digits')
  assert '--workdir=DIR' in error_line(result)


@pytest.mark.parametrize(
  ('body', 'message'),
  [
    ('return 1 / 0', 'mine.py:3: ZeroDivisionError: division by zero'),
    ('return math.foo', "mine.py:3: AttributeError: module 'math' has no"),
    ('return ml_collections.ConfigDict({"model": {}})', 'missing or unknown'),
    (
      'c = digits.get_config(); c.optimizer.learning_rte = 5',
      "mine.py:3: Unknown setting 'learning_rte'. Did you mean "
      "'optimizer.learning_rate'?",
    ),
    (
      'c = digits.get_config(); c.batch_size = "many"',
      "mine.py:3: TypeError: Could not override field 'batch_size'",
    ),
    ('raise ValueError("No such size.")', 'nfnet_jax: No such size.'),
  ],
)
def test_a_config_file_that_is_wrong(run_command, tmp_path, body, message):
  path = tmp_path / 'mine.py'
  imports = 'import math, ml_collections; '
  imports += 'from nfnet_jax.experiments.configs import digits'
  path.write_text(f'{imports}\ndef get_config():\n  {body}\n')
  result = run_command(
    train.main, f'--config={path}', f'--workdir={tmp_path}/run'
  )
  assert message in error_line(result)


@pytest.mark.slow
def test_a_config_file_without_a_config(run_command, tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text('config = None\n')
  message = f"nfnet_jax: '{path}' defines no get_config()."
  result = run_command(
    train.main, f'--config={path}', f'--workdir={tmp_path}/run'
  )
  assert error_line(result) == message
  plans = '--config=f0', '--topology=v3:2x2', f'--compare={path}'
  assert error_line(run_command(plan.main, *plans)) == message
  path.write_text('def get_config():\n  return 1 / 0\n')
  assert f'{path}:2: ZeroDiv' in error_line(run_command(plan.main, *plans))
  path.write_text('\ndef get_config(:\n')
  place = f'{path}:2: SyntaxError: '
  assert place in error_line(run_command(train.main, f'--config={path}'))
  path.write_text('def get_config():\n  return {}\n')
  result = run_command(
    train.main, f'--config={path}', f'--workdir={tmp_path}/run'
  )
  assert 'must return a ConfigDict' in error_line(result)


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('{tmp}/file/run', 'file is a file'),
    ('s3://bucket/run', "'s3://bucket/run'"),
    ('/proc/none/run', "'/proc/none/run' cannot be written to: /proc: "),
  ],
)
def test_a_workdir_that_cannot_be_written(run_command, tmp_path, name, message):
  (tmp_path / 'file').write_text('')
  workdir = name.format(tmp=tmp_path)
  result = run_command(train.main, '--config=digits', f'--workdir={workdir}')
  assert message in error_line(result)


def test_evaluate_without_a_run(run_command, tmp_path):
  result = run_command(evaluate.main, f'--workdir={tmp_path}', on_a_run=True)
  assert 'holds no run: it has no config.json' in error_line(result)


def test_evaluate_before_the_first_checkpoint(run_command, data_dir, tmp_path):
  from nfnet_jax.experiments.configs import digits

  settings = digits.get_config()
  settings.run.data_dir = data_dir
  workdir_lib.save(steps.prepare_config(settings), tmp_path, [])
  result = run_command(evaluate.main, f'--workdir={tmp_path}', on_a_run=True)
  assert 'holds no checkpoint yet' in error_line(result)


def test_the_resolved_config_can_be_printed(run_command):
  code, out, err = run_command(
    train.main, '--config=digits', '--config.seed=3', '--print_config'
  )
  assert (code, err) == (0, '')
  rows = [line.split()[:5] for line in out.splitlines()]
  assert ['seed', '3', 'command', 'line', 'Root'] in rows
  assert ['data.image_size', '32', 'derived', 'Image', 'size'] in rows


def test_configs_can_be_listed(run_command):
  code, out, err = run_command(train.main, '--list_configs')
  assert (code, err) == (0, '')
  assert out.startswith('digits ')
  assert 'NFNet-nano with AGC on the UCI handwritten digits.' in out


def test_a_config_may_take_an_argument(tmp_path, run_command):
  path = tmp_path / 'mine.py'
  path.write_text(
    'from nfnet_jax.experiments.configs import digits\n'
    'def get_config(size):\n'
    '  config = digits.get_config()\n'
    '  config.batch_size = int(size)\n'
    '  return config\n'
  )
  seen = []
  main = lambda: seen.append(config_flag.get_config().batch_size)
  assert run_command(main, f'--config={path}:24')[0] == 0
  assert run_command(main, '--config', f'{path}:40')[0] == 0
  assert seen == [24, 40]


def test_json_is_one_object(run_command):
  code, out, _ = run_command(lambda: print(json.dumps({'top1': 1.0})), '--json')
  assert (code, json.loads(out)) == (0, {'top1': 1.0})


@pytest.mark.parametrize('main', [train.main, evaluate.main])
def test_another_platform_than_the_required_is_refused(
  run_command, tmp_path, main
):
  arguments = '--config=digits', f'--workdir={tmp_path}'
  line = error_line(run_command(main, *arguments, '--require_platform=tpu'))
  assert '--require_platform=tpu, but JAX found only cpu devices' in line
  assert not list(tmp_path.iterdir())


def test_gpus_of_every_make_count_as_gpu(run_command, monkeypatch):
  """JAX calls the platform of CUDA and of ROCm `gpu`, too."""
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert run_command(enter, '--require_platform=gpu') == (0, '', '')
  line = error_line(run_command(enter, '--require_platform=cpu'))
  assert '--require_platform=cpu, but JAX found only gpu devices' in line


def test_a_workdir_that_does_not_respond_is_a_failure_that_may_pass(
  run_command, tmp_path, monkeypatch
):
  def fail(*_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  monkeypatch.setattr(failures, 'as_os_error', fail)
  code, _, err = run_command(
    evaluate.main, f'--workdir={tmp_path}', on_a_run=True
  )
  *tries, line = err.splitlines()
  assert code == 1
  assert sum('Trying again in' in each for each in tries) == 3
  assert line.startswith('nfnet_jax: ')
  assert os.strerror(errno.EIO) in line


def enter():
  with session.distributed_session():
    pass


NOT_NOW = "Backend 'tpu' failed to initialize: UNAVAILABLE: it is in use."
NEVER = 'Unknown backend tpu'


@pytest.mark.parametrize(
  ('found', 'asked', 'code', 'message'),
  [
    # JAX falls back silently, or may use TPUs only (JAX_PLATFORMS=tpu).
    ('cpu', NOT_NOW, 1, NOT_NOW),
    (NOT_NOW, None, 1, NOT_NOW),
    ('cpu', NEVER, 2, 'JAX found only cpu devices'),
    (NEVER, None, 2, NEVER),
  ],
)
def test_busy_devices_are_a_failure_that_may_pass(
  run_command, monkeypatch, found, asked, code, message
):
  def answer(text, *_):
    if text != 'cpu':
      raise RuntimeError(text)
    return text

  monkeypatch.setattr(jax, 'default_backend', lambda: answer(found))
  monkeypatch.setattr(jax, 'devices', lambda name: answer(asked, name))
  ended, out, err = run_command(enter, '--require_platform=tpu')
  assert (ended, out) == (code, '')
  assert message in err
  assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
  ('number', 'code'),
  [
    (errno.ENOSPC, 1),
    (errno.EDQUOT, 1),
    (errno.EFBIG, 1),
    (errno.EIO, 1),
    (errno.EROFS, 2),
    (errno.EACCES, 2),
  ],
)
def test_a_full_disk_is_a_failure_that_may_pass(
  run_command, tmp_path, monkeypatch, number, code
):
  def fail(path, text):
    raise OSError(number, os.strerror(number), path)

  monkeypatch.setattr(files, 'write_atomically', fail)
  main = lambda: workdir_lib.save(base.get_config(), tmp_path, ['a'])
  ended, _, err = run_command(main)
  assert ended == code
  assert os.strerror(number) in err
  assert len(err.splitlines()) == 1


def test_devices_of_processes_that_were_not_joined(run_command, monkeypatch):
  """As on one host of a pod, run with `--num_processes=1`."""
  monkeypatch.setattr(jax, 'process_count', lambda: 4)
  line = error_line(run_command(enter, '--num_processes=1'))
  assert 'the devices of 4 processes, which were not joined' in line


def test_devices_that_do_not_answer_are_counted(run_command, monkeypatch):
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(data_parallel.DataParallel, 'count', lambda self: 7)
  # It would end the tests, too.
  monkeypatch.setattr(processes, 'exit_alone', sys.exit)
  code, _, _ = run_command(enter)
  assert code.startswith('7 of 8 devices answered.')


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
def test_processes_that_cannot_be(run_command, tmp_path, flags, message):
  arguments = '--config=digits', f'--workdir={tmp_path}'
  assert message in error_line(run_command(train.main, *arguments, *flags))
