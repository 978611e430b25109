"""The README and the guides in `docs/` are true: commands, code and links."""

import importlib.util
import json
import os
import pathlib
import pickle
import re
import shlex
import subprocess
import sys

import ml_collections
from PIL import Image
import pytest

import nfnet_jax
from nfnet_jax.config import fast_paths
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
from nfnet_jax.experiments.configs import digits
from nfnet_jax.planning import report
from tests import trained_weights
from tests.end_to_end import process_groups
from tests.launch import conftest
from tests.planning import plans

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / 'README.md'
PAGES = [
  README,
  ROOT / 'CONTRIBUTING.md',
  *sorted((ROOT / 'docs').glob('*.md')),
]
PYTHON = '.venv/bin/python -m '


def blocks(page, language):
  """Return the code blocks of a page that are in a language, '' for output."""
  fences = re.findall(r'^```(\w*)\n(.*?)^```$', page.read_text(), re.S | re.M)
  return [code for name, code in fences if name == language]


def block(page, language, part):
  """Return the only code block of a page of `docs/` that contains `part`."""
  found = blocks(ROOT / 'docs' / page, language)
  (code,) = [code for code in found if part in code]
  return code


def commands(page):
  """Return the commands of a page's shell blocks."""
  lines = '\n'.join(blocks(page, 'sh')).replace('\\\n', ' ').splitlines()
  return [part for line in lines if line for part in line.split(' && ')]


def page_id(page):
  return str(page.relative_to(ROOT))


def inline_code(page):
  """Return the words of a page's inline code."""
  prose = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.S | re.M)
  spans = re.findall(r'`([^`]+)`', prose)
  return [word for span in spans for word in span.split()]


# Needs the files of a command; runs where this package cannot be imported.
CONSUMER = block('export.md', 'python', 'stablehlo')
EXAMPLES = [
  pytest.param(code, id=f'{page_id(page)}-{index}')
  for page in PAGES
  for index, code in enumerate(blocks(page, 'python'))
  if code != CONSUMER
]
OWN_COMMANDS = sorted(
  {
    command.removeprefix(PYTHON)
    for page in PAGES
    for command in commands(page)
    if command.startswith(f'{PYTHON}nfnet_jax.experiments.')
  }
)


@pytest.mark.parametrize('code', EXAMPLES)
def test_python_examples_run(code):
  exec(compile(code, 'example', 'exec'), {'__name__': 'example'})


def parse(run_command, module, *arguments):
  """Run a command as far as its `main`: its flags, config and arguments."""
  source = pathlib.Path(module.__file__).read_text()
  takes = re.search(r"command\.run\(main.*takes='(.*)'", source)
  main = lambda *arguments: None
  main.__module__ = module.__name__
  options = {'takes': takes[1]} if takes else {}
  code, out, err = run_command(main, *arguments, **options)
  assert code == 0, err
  return out


@pytest.mark.parametrize('command', OWN_COMMANDS)
def test_commands_parse(run_command, tmp_path, monkeypatch, command):
  name, *arguments = shlex.split(command)
  module = importlib.import_module(name)
  if module is evaluate and '--weights' not in command:
    arguments.append('--config=digits')  # In place of that of the run.
  code = block('experiments.md', 'python', 'def get_config')
  (tmp_path / 'mine.py').write_text(code)
  monkeypatch.chdir(tmp_path)
  parse(run_command, module, *arguments)


def test_example_config_is_a_config(run_command, tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(block('experiments.md', 'python', 'def get_config'))
  code, out, err = run_command(train.main, f'--config={path}', '--print_config')
  assert code == 0, err
  assert 'cifar10' in out


@pytest.mark.parametrize('page', PAGES, ids=page_id)
def test_other_commands_exist(page):
  """What they call is in the repository, or a tool that they install."""
  extras = re.findall(r"^    '(\w+)': ", (ROOT / 'setup.py').read_text(), re.M)
  for command in commands(page):
    words = shlex.split(command)
    asked = re.findall(r"\.\[(\w+)\]'", command)
    assert set(asked) <= set(extras), command
    while '=' in words[0]:
      del words[0]
    match words:
      case ['.venv/bin/python', '-m', module, *_]:
        assert importlib.util.find_spec(module), command
      case ['python3', '-m', 'venv', '.venv']:
        pass
      case [
        (
          '.venv/bin/pip'
          | '.venv/bin/ruff'
          | '.venv/bin/mypy'
          | '.venv/bin/xprof'
        ),
        *_,
      ]:
        pass
      case ['export', *_]:
        pass
      case _:
        assert (ROOT / words[0]).is_file(), command


def test_configs_and_settings_in_prose_exist(run_command):
  words = {word for page in PAGES for word in inline_code(page)}
  flags = {
    word
    for word in words
    if word.startswith('--') and '=' in word and 'NAME=' not in word
  }
  names = sorted(flag for flag in flags if flag.startswith('--config='))
  overrides = sorted(flag for flag in flags if flag.startswith('--config.'))
  assert names
  assert overrides
  parse(run_command, train, '--config=f0', *overrides)
  for name in names:
    if '.py' not in name and '=NAME' not in name:
      parse(run_command, train, name)
  config = digits.get_config()
  for word in words:
    key = re.fullmatch(r'(?:config\.)?((optimizer|data|run)\.[a-z_]+)', word)
    if key:
      place = config
      for part in key[1].split('.'):
        assert part in place, word
        place = place[part]
      assert not isinstance(place, ml_collections.ConfigDict), word


def run_commands(run_command, text, expected):
  """Run the lines of a shell block.

  Args:
    run_command: the fixture.
    text: the block.
    expected: name of each command, in order -> its module, more arguments, and
      options of `run_command`.
  """
  lines = [shlex.split(line) for line in text.splitlines()]
  names = [
    module.removeprefix('nfnet_jax.experiments.') for _, _, module, *_ in lines
  ]
  assert names == list(expected)
  for name, (_, _, _, *arguments) in zip(names, lines):
    module, more, options = expected[name]
    result = run_command(module.main, *arguments, *more, **options)
    assert result[0] == 0, result


def test_imagenet_commands_run(
  run_command, small_recipe, imagenet_tars, tmp_path, monkeypatch
):
  """With a small ImageNet and a small network, otherwise unchanged."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'tars').symlink_to(imagenet_tars)
  small = [flag for flag in small_recipe[1:] if 'data_dir' not in flag]
  run_commands(
    run_command,
    block('imagenet.md', 'sh', 'prepare imagenet2012'),
    {
      'prepare': (prepare, ['--partial'], {'takes': 'DATASET'}),
      'show_batch': (show_batch, small, {}),
      'train': (train, small, {}),
    },
  )
  for path in ('sheets/train.png', 'runs/f0/curves.png'):
    assert (tmp_path / path).is_file()


def test_model_commands_run(run_command, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  table = block('reproducing.md', 'sh', 'experiments.models')
  plot = block('reproducing.md', 'sh', 'signal_propagation')
  run_commands(
    run_command,
    table + plot,
    {
      'models': (models, [], {'takes': '[PATTERN]'}),
      'signal_propagation': (signal_propagation, [], {'on_a_run': True}),
    },
  )
  assert (tmp_path / 'plots' / 'nf_resnet50.png').is_file()


def test_trained_network_commands_run(
  run_command, small, imagenet_dir, tmp_path, monkeypatch
):
  """With a small network in the published format, otherwise unchanged."""
  monkeypatch.chdir(tmp_path)
  params, _ = trained_weights.randomize(nfnet_jax.create_model('nfnet_pico'))
  (tmp_path / 'F0_haiku.npz').write_bytes(pickle.dumps(params))
  (tmp_path / 'datasets').symlink_to(imagenet_dir)
  (tmp_path / 'photos').mkdir()
  Image.new('RGB', (60, 40), 'red').save(tmp_path / 'photos' / 'red.jpg')
  use = block('weights.md', 'sh', 'experiments.predict')
  fine_tune = block('fine_tuning.md', 'sh', '--workdir=runs/cifar10\n')
  short = [*small[1:], '--config.dataset=digits', '--config.data.shards=8']
  pico = ['--config.model.name=nfnet_pico', '--config.run.eval_batch_size=16']
  run_commands(
    run_command,
    use + fine_tune,
    {
      'predict': (predict, [], {'takes': 'IMAGE...'}),
      'evaluate': (evaluate, pico, {'on_a_run': True}),
      'features': (features, [], {'takes': '[IMAGE...]'}),
      'convert': (convert, [], {}),
      'train': (train, short, {}),
    },
  )
  for path in ('predictions.png', 'features.npz', 'F0.safetensors'):
    assert (tmp_path / path).is_file()
  assert nfnet_jax.load_weights('runs/cifar10').num_classes == 10


@pytest.mark.parametrize('name', ['nfnet_pico', 'bn_resnet_pico'])
def test_exported_model_runs_without_this_package(
  run_command, tmp_path, monkeypatch, name
):
  _, trained = trained_weights.random_weights(name)
  (tmp_path / 'runs').mkdir()
  nfnet_jax.save_weights(tmp_path / 'runs' / 'f0.npz', trained)
  (tmp_path / 'runs' / 'f0.npz').rename(tmp_path / 'runs' / 'f0')
  trained_weights.draw_photo(tmp_path / 'photo.jpg')
  monkeypatch.chdir(tmp_path)
  text = block('export.md', 'sh', '--out=exported\n')
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
  """With a small network, in a separate process; see `tests/planning/`."""
  pytest.importorskip('libtpu')
  _, line = block('plan.md', 'sh', "'.[plan]'").splitlines()
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
  texts = block('plan.md', '', '\nmemory '), report.summary(plans.make())
  shown, printed = (
    dict(
      line.split(maxsplit=1) for line in text.partition('\n\n')[0].splitlines()
    )
    for text in texts
  )
  assert list(shown) == list(printed)
  assert shown['estimate'] == printed['estimate']


def test_page_of_fast_paths_lists_them_with_their_platforms():
  page = (ROOT / 'docs' / 'fast_paths.md').read_text()
  rows = re.findall(r'^\| `(\w+)` \| .* \| (.*) \|$', page, re.MULTILINE)
  every = 'tpu', 'gpu', 'cpu'
  assert rows == [
    (
      name,
      'all' if path.platforms == every else ', '.join(path.platforms).upper(),
    )
    for name, path in fast_paths.FAST_PATHS.items()
  ]


def test_cloud_commands_run(tmp_path):
  """As a dry run, which calls nothing outside the repository."""
  text = block('pods.md', 'sh', 'launch/')
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
  """With processes in place of hosts, and a small config."""
  (line,) = block('pods.md', 'sh', '--coordinator').splitlines()
  for shown, here in {
    'host0:8476': f'127.0.0.1:{process_groups.free_port()}',
    '--num_processes=4': '--num_processes=2',
    '--config=f0': ' '.join(map(shlex.quote, small)),
    '--workdir=runs/f0': f'--workdir={tmp_path}/run',
  }.items():
    assert line.count(shown) == 1
    line = line.replace(shown, here)
  assert line.endswith('--process_id=0')
  _, _, module, *arguments, _ = shlex.split(line)
  processes = [
    process_groups.Process(
      module, *arguments, f'--process_id={index}', devices=4
    )
    for index in range(2)
  ]
  for process in processes:
    assert process.finish() == 0, process.output
  assert 'process    1 of 2' in processes[1].lines
  assert process_groups.checkpoints_of(tmp_path / 'run') == [3, 6]


@pytest.mark.parametrize('page', PAGES, ids=page_id)
def test_links_lead_to_files(page):
  links = re.findall(r'\]\(([^)]+)\)', page.read_text())
  for link in links:
    if '://' not in link:
      assert (page.parent / link.partition('#')[0]).exists(), link


def test_named_files_are_there():
  folders = 'experiments', 'nfnet_jax', 'tests', 'docs', 'launch', '.ci'
  names = {
    word
    for page in PAGES
    for word in inline_code(page)
    if word.partition('/')[0] in folders and '*' not in word
  }
  missing = {name for name in names if not (ROOT / name).exists()}
  assert names
  assert not missing


def test_index_lists_every_guide():
  index = (ROOT / 'docs' / 'README.md').read_text()
  guides = {path.name for path in PAGES if path.parent.name == 'docs'}
  assert guides - {'README.md'} <= set(re.findall(r'\]\((\w+\.md)\)', index))


def test_architecture_lists_every_package():
  text = (ROOT / 'docs' / 'architecture.md').read_text()
  packages = {
    path.parent.name for path in (ROOT / 'nfnet_jax').glob('*/__init__.py')
  }
  assert packages == set(re.findall(r'^\| `(\w+)` \|', text, re.MULTILINE))


@pytest.mark.parametrize('title', ['Train', 'Evaluate', 'Test'])
def test_continuous_integration_finds_its_commands(title):
  """`.ci/run` takes the only shell block of these sections."""
  text = README.read_text()
  (section,) = re.findall(rf'^## {title}\n(.*?)(?=^## )', text, re.S | re.M)
  assert section.count('```sh\n') == 1
