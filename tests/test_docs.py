"""The README and the guides in `docs/` are true: commands, code and links.

`test_doc_commands.py` runs the commands.
"""

import importlib.util
import pathlib
import re
import shlex

import ml_collections
import pytest

from nfnet_jax.config import fast_paths
from nfnet_jax.experiments import evaluate, train
from nfnet_jax.experiments.configs import digits
from nfnet_jax.models import complexity, registry
from nfnet_jax.planning import report
from tests.pages import (
  block,
  blocks,
  commands,
  CONSUMER,
  inline_code,
  ONNX_CONSUMER,
  page_id,
  PAGES,
  README,
  ROOT,
)
from tests.planning import plans

PYTHON = '.venv/bin/python -m '


EXAMPLES = [
  pytest.param(code, id=f'{page_id(page)}-{index}')
  for page in PAGES
  for index, code in enumerate(blocks(page, 'python'))
  if code not in (CONSUMER, ONNX_CONSUMER)
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
      case ['.venv/bin/python', script, *_]:
        assert (ROOT / script).is_file(), command
      case ['python3', '-m', 'venv', '.venv']:
        pass
      case [
        (
          '.venv/bin/pip'
          | '.venv/bin/ruff'
          | '.venv/bin/jupyter'
          | '.venv/bin/mkdocs'
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


def test_models_of_the_readme_are_those_of_the_table():
  rows = re.findall(
    r'^\| \[?NFNet-F(\d).*?\| (\d+) M \| ([\d.]+) G \| (\d+) / (\d+) \| '
    r'([\d.]+) % \|$',
    README.read_text(),
    re.MULTILINE,
  )
  assert len(rows) == 4
  for number, *shown in rows:
    name = f'nfnet_f{number}'
    spec = registry.get_model_spec(name)
    parameters, macs = complexity.count_model(name)
    assert shown == [
      f'{parameters / 1e6:.0f}',
      f'{macs / 1e9:.1f}',
      str(spec.train_size),
      str(spec.test_size),
      str(spec.reported_top1),
    ]


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
