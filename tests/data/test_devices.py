"""TensorFlow stays off the accelerators; imports have no effect on it."""

import pathlib
import subprocess
import sys

import pytest
import tensorflow as tf

from nfnet_jax.data import sources

ROOT = pathlib.Path(__file__).parents[2]


def test_opening_a_dataset_hides_accelerators(data_dir, monkeypatch):
  hidden = []
  monkeypatch.setattr(
    tf.config,
    'set_visible_devices',
    lambda devices, kind: hidden.append((kind, devices)),
  )
  sources.load('digits', data_dir)
  assert hidden == [('GPU', []), ('TPU', [])]


@pytest.mark.slow  # Another process imports TensorFlow.
def test_imports_change_neither_the_environment_nor_devices():
  modules = sorted(
    f'nfnet_jax.data.{path.stem}'
    for path in (ROOT / 'nfnet_jax' / 'data').glob('[a-z]*.py')
  )
  program = (
    'import importlib, os\n'
    'import tensorflow as tf\n'
    'import tensorflow_datasets\n'
    'tf.config.set_visible_devices = None\n'
    'before = dict(os.environ)\n'
    f'for name in {modules}:\n'
    '  importlib.import_module(name)\n'
    'assert dict(os.environ) == before\n'
  )
  subprocess.run([sys.executable, '-c', program], check=True, cwd=ROOT)
