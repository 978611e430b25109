"""What the package needs, and what its extras add."""

import importlib.metadata
import re
import runpy
import subprocess
import sys

import pytest
import setuptools

import nfnet_jax
from nfnet_jax import errors
from tests import trained_weights
from tests.test_architecture import imports_of, PACKAGE, ROOT


@pytest.fixture(scope='module')
def options():
  """Return the arguments of `setuptools.setup`."""
  given = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setuptools, 'setup', lambda **options: given.update(options))
    runpy.run_path(str(ROOT / 'setup.py'))
  return given


def names(requirements):
  return {
    re.match(r'[\w-]+', text)[0].lower().replace('-', '_')
    for text in requirements
  }


def test_every_import_belongs_to_the_package_or_to_an_extra(options):
  installed = importlib.metadata.packages_distributions()
  core = names(options['install_requires'])
  imported = {
    name.partition('.')[0]
    for path in PACKAGE.rglob('*.py')
    for name in imports_of(path)
  }
  ours = {'nfnet_jax', '_typeshed'}  # The second one is for type checkers.
  for package in imported - sys.stdlib_module_names - ours:
    extra = errors._EXTRAS.get(package)
    given = names(options['extras_require'][extra]) if extra else core
    assert names(installed[package]) & given, package


WITHOUT = """\
import runpy, sys
sys.modules.update(dict.fromkeys({absent}))
sys.argv = ['nfnet', *{arguments}]
runpy.run_module('nfnet_jax', run_name='__main__', alter_sys=True)
"""


def run_without_extras(*arguments):
  """Run a command where the packages of all extras cannot be imported."""
  program = WITHOUT.format(absent=list(errors._EXTRAS), arguments=arguments)
  return subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, cwd=ROOT
  )


def test_prediction_needs_no_extra(tmp_path):
  _, weights = trained_weights.random_weights('nfnet_pico')
  nfnet_jax.save_weights(tmp_path / 'w.npz', weights)
  trained_weights.draw_photo(tmp_path / 'photo.jpg')
  run = run_without_extras(
    'predict', f'--weights={tmp_path}/w.npz', f'{tmp_path}/photo.jpg'
  )
  assert (run.returncode, run.stderr) == (0, '')
  assert len(run.stdout.splitlines()) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
  'arguments',
  [
    ['train', '--config=digits', '--workdir={tmp}/new'],
    ['predict', '--weights={tmp}', '{tmp}/a.png'],
  ],
  ids=['train', 'predict'],
)
def test_a_command_names_the_extra_that_it_lacks(tmp_path, arguments):
  (tmp_path / 'checkpoints').mkdir()
  (tmp_path / 'config.json').write_text('{}')
  (tmp_path / 'a.png').touch()
  run = run_without_extras(*(word.format(tmp=tmp_path) for word in arguments))
  assert (run.returncode, run.stdout) == (2, '')
  (line,) = run.stderr.splitlines()
  assert "pip install '.[train]'" in line


@pytest.mark.slow
def test_a_missing_dataset_is_reported_without_tensorflow(tmp_path):
  """TensorFlow takes seconds to import."""
  arguments = 'train', '--config=f0', f'--workdir={tmp_path}/run'
  arguments += (f'--config.run.data_dir={tmp_path}',)
  program = WITHOUT.format(absent=['tensorflow'], arguments=arguments)
  run = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, cwd=ROOT
  )
  assert (run.returncode, run.stdout) == (2, '')
  (line,) = run.stderr.splitlines()
  assert f"Dataset 'imagenet2012' is not prepared under {tmp_path}. " in line
