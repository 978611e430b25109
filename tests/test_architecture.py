"""Import rules, the cost of imports, and the contents of the wheel."""

import ast
import pathlib
import resource
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'nfnet_jax'
COMMANDS = sorted(
  path.stem for path in (PACKAGE / 'experiments').glob('[a-z]*.py')
)

_BASE = {'errors', 'preprocessing', 'trees'}
_STORAGE = {*_BASE, 'storage'}
_TRAINING = {
  *_STORAGE,
  'models',
  'optim',
  'distributed',
  'plotting',
  'training',
}
_WEIGHTS = {*_STORAGE, 'images', 'models', 'training', 'weights'}
_CONFIG = {*_TRAINING, *_WEIGHTS, 'export', 'planning', 'data', 'config'}
# Package or module -> what of this package it may import.
RULES = {
  'errors.py': set(),
  'trees.py': set(),
  'preprocessing.py': set(),
  'images.py': {'errors', 'preprocessing'},
  'plotting.py': {'storage'},
  'storage': _STORAGE,
  'models': {*_BASE, 'models'},
  'optim': {*_BASE, 'optim'},
  'data': {*_STORAGE, 'data', 'images'},
  'distributed': {*_STORAGE, 'distributed'},
  'training': _TRAINING,
  'weights': _WEIGHTS,
  'export': {*_WEIGHTS, 'export'},
  'planning': {*_TRAINING, 'planning'},
  'config': _CONFIG,
  'cli': {*_CONFIG, 'cli', ''},
  'experiments': {*_CONFIG, 'cli', 'experiments', ''},
  '__main__.py': {'', 'cli', 'errors', 'experiments'},
}
_TENSORFLOW = {'tensorflow', 'tensorflow_datasets'}
# Package -> libraries that it must not import.
FORBIDDEN = dict.fromkeys(RULES, _TENSORFLOW) | {
  'models': {*_TENSORFLOW, 'optax'},
  'optim': {*_TENSORFLOW, 'haiku'},
  'data': {'jax', 'haiku', 'optax'},
}

# The one file that joins the libraries of two packages.
ALLOWED = {PACKAGE / 'export' / 'saved_model.py': {'tensorflow'}}


def imports_of(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def sources(name):
  path = PACKAGE / name
  return [path] if path.is_file() else sorted(path.rglob('*.py'))


def test_every_package_has_a_rule():
  names = {
    path.name
    for path in PACKAGE.iterdir()
    if path.is_dir() or path.suffix == '.py'
  }
  assert names - {'__pycache__', '__init__.py'} == set(RULES)


@pytest.mark.parametrize('name', RULES)
def test_imports_follow_the_rules(name):
  for path in sources(name):
    forbidden = FORBIDDEN[name] - ALLOWED.get(path, set())
    for imported in imports_of(path):
      first, *rest = imported.split('.')
      assert first not in forbidden, f'{path}: {imported}'
      if first == 'nfnet_jax':
        assert ''.join(rest[:1]) in RULES[name], f'{path}: {imported}'


def test_no_package_imports_a_command():
  imported = {
    name for path in PACKAGE.rglob('*.py') for name in imports_of(path)
  }
  assert not imported & {f'nfnet_jax.experiments.{name}' for name in COMMANDS}


def test_only_one_file_uses_pmap():
  users = [
    str(path.relative_to(PACKAGE))
    for path in PACKAGE.rglob('*.py')
    if any(
      'pmap' in (getattr(node, 'attr', ''), getattr(node, 'name', ''))
      for node in ast.walk(ast.parse(path.read_text()))
    )
  ]
  assert users == ['training/data_parallel.py']


def test_only_one_file_imports_matplotlib():
  users = [
    str(path.relative_to(PACKAGE))
    for path in PACKAGE.rglob('*.py')
    if any(name.startswith('matplotlib') for name in imports_of(path))
  ]
  assert users == ['plotting.py']


def test_import_is_quick_and_leaves_tensorflow_alone():
  program = (
    'import sys, time; start = time.process_time(); import nfnet_jax; '
    'took = time.process_time() - start; '
    'heavy = {"tensorflow", "tensorflow_datasets", "orbax", "matplotlib"}; '
    'print(took, *(heavy & set(sys.modules)))'
  )

  def run_import():
    command = [sys.executable, '-c', program]
    run = subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    seconds, *heavy = run.stdout.split()
    assert not heavy
    return float(seconds)

  # The first time, Python may have compiled the sources.
  assert run_import() < 2 or run_import() < 2


def test_imports_have_no_side_effects():
  """Environment and logging stay as they are after the libraries' imports."""
  modules = [
    str(path.relative_to(ROOT).with_suffix('')).replace('/', '.')
    for name in ('models', 'optim', 'storage', 'distributed', 'training')
    for path in sources(name)
    if path.name != '__init__.py'
  ]
  program = (
    'import importlib, os; from absl import logging; '
    'import haiku, optax, orbax.checkpoint, tensorboardX, tqdm; '
    'state = lambda: (dict(os.environ), list(logging.get_absl_logger().filters)'
    '); before = state(); '
    f'[importlib.import_module(name) for name in {modules}]; '
    'assert state() == before'
  )
  subprocess.run([sys.executable, '-c', program], check=True, cwd=ROOT)


def children_seconds():
  """Return the processor time of all child processes that have ended."""
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime


def test_commands_import_slow_libraries_only_to_use_them():
  modules = ', '.join(f'nfnet_jax.experiments.{name}' for name in COMMANDS)
  program = (
    f'import sys, {modules}; '
    'heavy = {"tensorflow", "orbax", "tensorboardX", "matplotlib", "sklearn"}; '
    'assert not heavy & set(sys.modules)'
  )
  subprocess.run([sys.executable, '-c', program], check=True, cwd=ROOT)


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name == 'train' else pytest.mark.slow)
    for name in COMMANDS
  ],
)
def test_help_is_quick(name):
  command = [sys.executable, '-m', f'nfnet_jax.experiments.{name}', '--help']

  def run_help():
    start = children_seconds()
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return run.stdout, children_seconds() - start

  text, seconds = run_help()
  assert '  --' in text
  assert f'python -m nfnet_jax.experiments.{name} ' in text
  # The first time, Python may have compiled the sources.
  assert seconds < 3 or run_help()[1] < 3


@pytest.mark.slow
def test_wheel_holds_every_source_and_config(tmp_path):
  copy = tmp_path / 'source'  # Building leaves files in the tree.
  shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.git', 'build'))
  command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps']
  command += ['--no-build-isolation', '--wheel-dir', str(tmp_path), str(copy)]
  subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
  (wheel,) = tmp_path.glob('*.whl')
  held = set(zipfile.ZipFile(wheel).namelist())
  expected = {str(p.relative_to(ROOT)) for p in PACKAGE.rglob('*.py')}
  expected |= {'nfnet_jax/py.typed', 'nfnet_jax/models/structure.json'}
  assert expected <= held
  assert not any(name.startswith('tests/') for name in held)
