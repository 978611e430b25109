"""What the README shows works as it stands there."""

import pathlib
import re

import pytest

from nfnet_jax.experiments import assemble, cli, prepare, show_batch, train

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
  assert config.data.dataset == 'cifar10'


def test_imagenet_commands_run(
  door, small_recipe, imagenet_tars, tmp_path, monkeypatch
):
  """As they stand, on a small ImageNet and with a small network."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'tars').symlink_to(imagenet_tars)
  (text,) = [text for text in blocks('sh') if 'prepare imagenet2012' in text]
  less = [flag for flag in small_recipe[1:] if 'data_dir' not in flag]
  extra = {'prepare': ['--partial'], 'show_batch': less, 'train': less}
  doors = {'prepare': prepare, 'show_batch': show_batch, 'train': train}
  run = []
  for line in text.splitlines():
    _, _, module, *arguments = line.split()
    name = module.removeprefix('nfnet_jax.experiments.')
    takes = 'DATASET' if name == 'prepare' else ''
    result = door(doors[name].main, *arguments, *extra[name], takes=takes)
    assert result[0] == 0, result
    run.append(name)
  assert run == list(doors)
  for path in ('sheets/train.png', 'runs/f0/curves.png'):
    assert (tmp_path / path).is_file()


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
