"""Who may import whom, what an import costs, and what the package holds."""

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

# Room -> the rooms of this package that it may import.
ROOMS = {
  'models': {'models'},
  'optim': {'optim'},
  'data': {'data'},
  'training': {'models', 'optim', 'training'},
  'weights': {'models', 'optim', 'training', 'weights'},
  'pods': {'training', 'pods'},
  'experiments': {
    'models',
    'optim',
    'data',
    'training',
    'weights',
    'pods',
    'experiments',
  },
}
FORBIDDEN = {
  'models': {'optax', 'tensorflow', 'tensorflow_datasets'},
  'optim': {'haiku', 'tensorflow', 'tensorflow_datasets'},
  'data': {'jax', 'haiku', 'optax'},
  'training': {'tensorflow', 'tensorflow_datasets'},
  'weights': {'tensorflow', 'tensorflow_datasets'},
  'pods': {'tensorflow', 'tensorflow_datasets'},
  'experiments': {'tensorflow', 'tensorflow_datasets'},
}


# The one file that joins two rooms' libraries.
ALLOWED = {PACKAGE / 'weights' / 'saved_model.py': {'tensorflow'}}


def imports_of(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def sources(room):
  return sorted((PACKAGE / room).rglob('*.py'))


def test_every_room_has_its_rule():
  rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
  assert rooms - {'__pycache__'} == set(ROOMS)


@pytest.mark.parametrize('room', ROOMS)
def test_floors(room):
  for path in sources(room):
    forbidden = FORBIDDEN[room] - ALLOWED.get(path, set())
    for name in imports_of(path):
      parts = name.split('.')
      assert parts[0] not in forbidden, f'{path}: {name}'
      if parts[0] == 'nfnet_jax' and len(parts) > 1:
        assert parts[1] in ROOMS[room], f'{path}: {name}'


def test_only_one_file_knows_pmap():
  knowing = [
    str(path.relative_to(PACKAGE))
    for path in PACKAGE.rglob('*.py')
    if any(
      'pmap' in (getattr(node, 'attr', ''), getattr(node, 'name', ''))
      for node in ast.walk(ast.parse(path.read_text()))
    )
  ]
  assert knowing == ['training/parallel.py']


def test_only_one_file_sets_matplotlib_up():
  knowing = [
    str(path.relative_to(PACKAGE))
    for path in PACKAGE.rglob('*.py')
    if any(name.startswith('matplotlib') for name in imports_of(path))
  ]
  assert knowing == ['training/pictures.py']


def test_import_is_quick_and_leaves_tensorflow_alone():
  program = (
    'import sys, time; start = time.process_time(); import nfnet_jax; '
    'took = time.process_time() - start; '
    'heavy = {"tensorflow", "tensorflow_datasets", "orbax", "matplotlib"}; '
    'print(took, *(heavy & set(sys.modules)))'
  )
  runs = [
    subprocess.run(
      [sys.executable, '-c', program],
      check=True,
      capture_output=True,
      text=True,
      cwd=ROOT,
    ).stdout.split()
    for _ in range(2)
  ]
  assert all(len(words) == 1 for words in runs), runs
  assert min(float(words[0]) for words in runs) < 2


def children_seconds():
  """Processor time of all processes started so far."""
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
  'door',
  [
    'train',
    'evaluate',
    'convert',
    'export',
    'features',
    'predict',
    'prepare',
    'show_batch',
    'models',
    'signal_propagation',
    'plan',
  ],
)
def test_help_is_quick(door):
  command = [sys.executable, '-m', f'nfnet_jax.experiments.{door}', '--help']
  seconds = []
  for _ in range(2):
    start = children_seconds()
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    seconds.append(children_seconds() - start)
  assert '  --' in run.stdout
  assert f'python -m nfnet_jax.experiments.{door} ' in run.stdout
  assert min(seconds) < 3


def test_wheel_holds_every_source_and_config(tmp_path):
  copy = tmp_path / 'source'  # Building leaves files in the tree.
  shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.git', 'build'))
  command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps']
  command += ['--no-build-isolation', '--wheel-dir', str(tmp_path), str(copy)]
  subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
  (wheel,) = tmp_path.glob('*.whl')
  held = set(zipfile.ZipFile(wheel).namelist())
  expected = {str(p.relative_to(ROOT)) for p in PACKAGE.rglob('*.py')}
  assert expected <= held
  assert not any(name.startswith('tests/') for name in held)
