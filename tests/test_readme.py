"""What the README shows works as it stands there."""

import json
import os
import pathlib
import pickle
import re
import shlex
import subprocess
import sys

from absl import flags
from PIL import Image
import pytest

import nfnet_jax
from nfnet_jax.config import lookup, validate
from nfnet_jax.experiments import (
  convert,
  evaluate,
  export,
  features,
  models,
  predict,
  prepare,
  show_batch,
  signal_propagation,
  train,
)
from nfnet_jax.planning import report
from tests import trained_weights
from tests.end_to_end import process_groups
from tests.launch import conftest
from tests.planning import test_report

flags.declare_key_flag('config')  # Of the door that is made here.

README = pathlib.Path(__file__).parents[1] / 'README.md'


def blocks(language):
  return re.findall(rf'```{language}\n(.*?)```', README.read_text(), re.DOTALL)


# Needs what a command writes first; runs where this package is out of reach.
(CONSUMER,) = [code for code in blocks('python') if 'stablehlo' in code]


@pytest.mark.parametrize(
  'code', [code for code in blocks('python') if code != CONSUMER]
)
def test_python_examples_run(code):
  exec(compile(code, 'README.md', 'exec'), {'__name__': 'readme'})


def test_example_config_is_a_config(run_command, tmp_path):
  (code,) = [text for text in blocks('python') if 'def get_config' in text]
  path = tmp_path / 'mine.py'
  path.write_text(code)
  seen = []
  result = run_command(
    lambda: seen.append(lookup.get_config()), f'--config={path}'
  )
  assert result[0] == 0, result
  config = validate.resolve_and_check(seen[0])
  assert config.dataset == 'cifar10'


def run_commands(run_command, text, doors):
  """Runs the lines of a shell block; `doors`: name -> door, flags, options."""
  lines = [shlex.split(line) for line in text.splitlines()]
  names = [
    module.removeprefix('nfnet_jax.experiments.') for _, _, module, *_ in lines
  ]
  assert names == list(doors)
  for name, (_, _, _, *arguments) in zip(names, lines):
    module, extra, options = doors[name]
    result = run_command(module.main, *arguments, *extra, **options)
    assert result[0] == 0, result


def test_imagenet_commands_run(
  run_command, small_recipe, imagenet_tars, tmp_path, monkeypatch
):
  """As they stand, on a small ImageNet and with a small network."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'tars').symlink_to(imagenet_tars)
  (text,) = [text for text in blocks('sh') if 'prepare imagenet2012' in text]
  less = [flag for flag in small_recipe[1:] if 'data_dir' not in flag]
  run_commands(
    run_command,
    text,
    {
      'prepare': (prepare, ['--partial'], {'takes': 'DATASET'}),
      'show_batch': (show_batch, less, {}),
      'train': (train, less, {}),
    },
  )
  for path in ('sheets/train.png', 'runs/f0/curves.png'):
    assert (tmp_path / path).is_file()


def test_model_commands_run(run_command, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (text,) = [text for text in blocks('sh') if 'experiments.models' in text]
  run_commands(
    run_command,
    text,
    {
      'models': (models, [], {'takes': '[PATTERN]'}),
      'signal_propagation': (signal_propagation, [], {'on_a_run': True}),
    },
  )
  assert (tmp_path / 'plots' / 'nf_resnet50.png').is_file()


def test_trained_network_commands_run(
  run_command, small, imagenet_dir, tmp_path, monkeypatch
):
  """As they stand, with a small network in the published format."""
  monkeypatch.chdir(tmp_path)
  params, _ = trained_weights.randomize(nfnet_jax.create('nfnet_pico'))
  (tmp_path / 'F0_haiku.npz').write_bytes(pickle.dumps(params))
  (tmp_path / 'datasets').symlink_to(imagenet_dir)
  (tmp_path / 'photos').mkdir()
  Image.new('RGB', (60, 40), 'red').save(tmp_path / 'photos' / 'red.jpg')
  (text,) = [text for text in blocks('sh') if 'experiments.predict' in text]
  less = [*small[1:], '--config.dataset=digits', '--config.data.shards=8']
  less += ['--config.data.eval_split=test']
  pico = ['--config.model.name=nfnet_pico', '--config.run.eval_batch_size=16']
  run_commands(
    run_command,
    text,
    {
      'predict': (predict, [], {'takes': 'IMAGE...'}),
      'evaluate': (evaluate, pico, {'on_a_run': True}),
      'features': (features, [], {'takes': '[IMAGE...]'}),
      'convert': (convert, [], {}),
      'train': (train, less, {}),
    },
  )
  for path in ('predictions.png', 'features.npz', 'F0.safetensors'):
    assert (tmp_path / path).is_file()
  assert nfnet_jax.load_weights('runs/cifar10').num_classes == 10


@pytest.mark.parametrize('name', ['nfnet_pico', 'bn_resnet_pico'])
def test_exported_model_runs_without_this_package(
  run_command, tmp_path, monkeypatch, name
):
  (text,) = [text for text in blocks('sh') if 'experiments.export' in text]
  _, trained = trained_weights.random_weights(name)
  (tmp_path / 'runs').mkdir()
  nfnet_jax.save_weights(tmp_path / 'runs' / 'f0.npz', trained)
  (tmp_path / 'runs' / 'f0.npz').rename(tmp_path / 'runs' / 'f0')
  trained_weights.draw_photo(tmp_path / 'photo.jpg')
  monkeypatch.chdir(tmp_path)
  run_commands(run_command, text, {'export': (export, [], {})})
  blocked = 'import sys; sys.modules.update(haiku=None, nfnet_jax=None)\n'
  run = subprocess.run(
    [sys.executable, '-c', blocked + CONSUMER],
    check=True,
    capture_output=True,
    text=True,
  )
  flags = '--weights=runs/f0', '--json', 'photo.jpg'
  code, out, err = run_command(predict.main, *flags, takes='IMAGE...')
  assert code == 0, err
  (image,) = json.loads(out)['images']
  lines = [line.split(maxsplit=1) for line in run.stdout.splitlines()]
  assert [row['name'] for row in image['top5']] == [text for _, text in lines]
  for row, (share, _) in zip(image['top5'], lines):
    assert abs(100 * row['probability'] - float(share.removesuffix('%'))) < 1


def test_plan_command_runs(tmp_path):
  """With a small network; in a process of its own, see tests/pods."""
  pytest.importorskip('libtpu')
  (text,) = [text for text in blocks('sh') if 'experiments.plan' in text]
  _, line = text.splitlines()
  command = [sys.executable, *shlex.split(line)[1:]]
  command += ['--config.model.name=nfnet_pico', '--config.batch_size=512']
  run = subprocess.run(
    [*command, '--quick'],
    capture_output=True,
    text=True,
    env={
      **os.environ,
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
      'XDG_CACHE_HOME': str(tmp_path),
    },
  )
  assert run.returncode == 0, run.stderr
  assert '128 cores of 64 chips TPU v3, 16 hosts' in run.stdout
  assert 'convolutions, stage 3' in run.stdout


def test_plan_is_shown_as_it_is_printed():
  sample = re.search(r'```\n(plan .*?)```', README.read_text(), re.DOTALL)[1]
  said = {}
  for text in (sample, report.summary(test_report.make())):
    lines = text.partition('\n\n')[0].splitlines()
    said[text] = dict(line.split(maxsplit=1) for line in lines)
  shown, printed = said.values()
  assert list(shown) == list(printed)
  assert shown['estimate'] == printed['estimate']


def test_cloud_commands_run(tmp_path):
  """As a dry run, which calls nothing: no script of `launch/` needs a cloud."""
  (text,) = [text for text in blocks('sh') if 'launch/' in text]
  dry = text.replace('launch/supervise.sh', 'launch/supervise.sh --dry_run')
  run = subprocess.run(
    ['bash', '-euc', dry],
    cwd=conftest.Cloud(tmp_path).repo,
    env={'PATH': '/usr/bin:/bin'},
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stderr
  for command in (
    'queued-resources create f3',
    '--accelerator-type=v3-128',
    '--spot',
    '--project=my-project --zone=europe-west4-a',
    'tpu-vm ssh f3 --worker=all',
    '--config=f3 --workdir=gs://my-bucket/runs/f3 --require_platform=tpu',
    '--config.run.data_dir=gs://my-bucket/datasets',
    'queued-resources delete f3',
  ):
    assert command in run.stdout


def test_command_of_several_hosts_runs(small, tmp_path):
  """As it stands, but for the hosts, which are processes, and the config."""
  (text,) = [text for text in blocks('sh') if '--coordinator' in text]
  (line,) = text.splitlines()
  for shown, here in {
    'host0:8476': f'127.0.0.1:{process_groups.free_port()}',
    '--num_processes=4': '--num_processes=2',
    '--config=f0': ' '.join(map(shlex.quote, small)),
    '--workdir=runs/f0': f'--workdir={tmp_path}/run',
  }.items():
    assert line.count(shown) == 1
    line = line.replace(shown, here)
  assert line.endswith('--process_id=0')
  _, _, run_command, *arguments, _ = shlex.split(line)
  processes = [
    process_groups.Process(
      run_command, *arguments, f'--process_id={index}', devices=4
    )
    for index in range(2)
  ]
  for process in processes:
    assert process.finish() == 0, process.output
  assert 'process    1 of 2' in processes[1].lines
  assert process_groups.checkpoints_of(tmp_path / 'run') == [3, 6]


def test_pictures_are_there():
  pictures = re.findall(r'!\[[^]]*\]\(([^)]+)\)', README.read_text())
  assert pictures
  assert all((README.parent / path).is_file() for path in pictures)


def test_named_files_are_there():
  names = re.findall(
    r'`((?:experiments|nfnet_jax|tests)/[^`*]*)`', README.read_text()
  )
  assert names
  assert all((README.parent / name).exists() for name in names)
