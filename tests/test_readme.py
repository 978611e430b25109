"""What the README shows works as it stands there."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from nfnet_jax.experiments import (
  assemble,
  cli,
  models,
  prepare,
  show_batch,
  signal_propagation,
  train,
)

README = pathlib.Path(__file__).parents[1] / 'README.md'


def blocks(language):
  return re.findall(rf'```{language}\n(.*?)```', README.read_text(), re.DOTALL)


@pytest.mark.parametrize('code', blocks('python'))
def test_python_examples_run(code):
  exec(compile(code, 'README.md', 'exec'), {'__name__': 'readme'})


def test_example_config_is_a_config(door, tmp_path):
  (code,) = [text for text in blocks('python') if 'def get_config' in text]
  path = tmp_path / 'mine.py'
  path.write_text(code)
  seen = []
  result = door(lambda: seen.append(cli.get_config()), f'--config={path}')
  assert result[0] == 0, result
  config = assemble.resolve_and_check(seen[0])
  assert config.dataset == 'cifar10'


def run_commands(door, text, doors):
  """Runs the lines of a shell block; `doors`: name -> door, flags, options."""
  lines = [shlex.split(line) for line in text.splitlines()]
  names = [
    module.removeprefix('nfnet_jax.experiments.') for _, _, module, *_ in lines
  ]
  assert names == list(doors)
  for name, (_, _, _, *arguments) in zip(names, lines):
    module, extra, options = doors[name]
    result = door(module.main, *arguments, *extra, **options)
    assert result[0] == 0, result


def test_imagenet_commands_run(
  door, small_recipe, imagenet_tars, tmp_path, monkeypatch
):
  """As they stand, on a small ImageNet and with a small network."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'tars').symlink_to(imagenet_tars)
  (text,) = [text for text in blocks('sh') if 'prepare imagenet2012' in text]
  less = [flag for flag in small_recipe[1:] if 'data_dir' not in flag]
  run_commands(
    door,
    text,
    {
      'prepare': (prepare, ['--partial'], {'takes': 'DATASET'}),
      'show_batch': (show_batch, less, {}),
      'train': (train, less, {}),
    },
  )
  for path in ('sheets/train.png', 'runs/f0/curves.png'):
    assert (tmp_path / path).is_file()


def test_model_commands_run(door, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (text,) = [text for text in blocks('sh') if 'experiments.models' in text]
  run_commands(
    door,
    text,
    {
      'models': (models, [], {'takes': '[PATTERN]'}),
      'signal_propagation': (signal_propagation, [], {'on_a_run': True}),
    },
  )
  assert (tmp_path / 'plots' / 'nf_resnet50.png').is_file()


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
