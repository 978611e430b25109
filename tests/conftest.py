"""Shared fixtures. Eight CPU devices stand in for the cores of a TPU."""

import gc
import os
import sys
import tempfile

from absl import flags
import pytest

from tests import buckets as buckets_lib

# Before anything imports JAX. The tests' processes share what they compile, the
# workers of pytest-xdist the folder of the process that started them.
_CACHE = tempfile.TemporaryDirectory()
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  '--xla_force_host_platform_device_count=8 '
  # Tests compile much and compute little. Slow ones, and the README's commands
  # in .ci/run, compile as users do.
  '--xla_backend_optimization_level=0'
)
# Before anything imports TensorFlow. Commands set the same two variables.
os.environ.update(buckets_lib.IMPATIENT)
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
if 'PYTEST_XDIST_WORKER' not in os.environ:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _CACHE.name
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'


@pytest.fixture(scope='module', autouse=True)
def _forgotten_programs():
  """Frees what a module compiled: Linux lets a process map 65,530 pieces."""
  yield
  gc.collect()
  if 'jax' in sys.modules:
    sys.modules['jax'].clear_caches()


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
  """A TFDS folder that is filled on first use."""
  return str(tmp_path_factory.mktemp('tensorflow_datasets'))


@pytest.fixture(scope='session')
def digits(data_dir):
  """The prepared digits."""
  from nfnet_jax.data import sources

  return sources.load('digits', data_dir)


@pytest.fixture(scope='session')
def imagenet_tars(tmp_path_factory):
  """A folder with the two tars of a small ImageNet."""
  from tests import imagenet

  folder = tmp_path_factory.mktemp('tars')
  imagenet.write_tars(folder)
  return folder


@pytest.fixture(scope='session')
def imagenet_dir(tmp_path_factory, imagenet_tars):
  """A TFDS folder with a small `imagenet2012` in it."""
  from tests import imagenet

  folder = str(tmp_path_factory.mktemp('imagenet'))
  imagenet.build(folder, imagenet_tars)
  return folder


@pytest.fixture(scope='session')
def small_imagenet(imagenet_dir):
  """The small ImageNet, opened."""
  from nfnet_jax.data import sources

  return sources.load('imagenet2012', imagenet_dir)


@pytest.fixture(scope='session')
def small_recipe(imagenet_dir):
  """Flags of the published recipe on the small ImageNet, with `nfnet_pico`."""
  return [
    '--config=f0',
    f'--config.run.data_dir={imagenet_dir}',
    '--config.model.name=nfnet_pico',
    '--config.run.fast_paths=fused_blocks',  # Compiles sooner.
    '--config.batch_size=16',
    '--config.train_for=2 epochs',
    '--config.optimizer.warmup=2 steps',
    '--config.data.shards=8',
    '--config.data.randaugment_layers=4',
    '--config.data.randaugment_magnitude=5',
    '--config.run.eval_every=1 epoch',
    '--config.run.checkpoint_every=3 steps',
    '--config.run.log_every=2 steps',
  ]


@pytest.fixture(scope='session')
def pico_params():
  """Random parameters of `nfnet_pico` with 10 classes, none of them zero."""
  import jax
  import numpy as np

  import nfnet_jax

  model = nfnet_jax.create('nfnet_pico', num_classes=10)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  params, _ = jax.eval_shape(
    lambda key, i: model.init(key, i, False), jax.random.key(0), images
  )
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda p: jax.numpy.asarray(0.5 * rng.standard_normal(p.shape), p.dtype),
    params,
  )


@pytest.fixture(scope='session')
def _storage(tmp_path_factory):
  # One for all: TensorStore and Orbax remember its address.
  with buckets_lib.Buckets(tmp_path_factory.mktemp('storage')) as buckets:
    yield buckets


@pytest.fixture
def buckets(_storage, monkeypatch):
  """A stand-in for Google Cloud Storage, a `buckets.Buckets`."""
  for name, value in _storage.environment.items():
    monkeypatch.setenv(name, value)
  monkeypatch.delenv('GOOGLE_APPLICATION_CREDENTIALS', raising=False)
  yield _storage
  _storage.forgive()


@pytest.fixture
def run_command(capfd, monkeypatch):
  """Runs a command in this process.

  `run_command(main, *arguments) -> (code, out, err)`.

  What is returned is the output of the command only.
  """
  from nfnet_jax.cli import command

  def run(main, *arguments, **options):
    _forget_flags()
    monkeypatch.setattr(sys, 'argv', ['command'])
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_info:
      command.run(main, ['command', *arguments], **options)
    out, err = capfd.readouterr()
    return exit_info.value.code or 0, out, err

  return run


@pytest.fixture(scope='session')
def small(data_dir):
  """Flags of a run that compiles and trains in seconds."""
  return [
    '--config=digits',
    f'--config.run.data_dir={data_dir}',
    '--config.model.name=nfnet_pico',
    '--config.run.fast_paths=fused_blocks',  # Compiles sooner.
    '--config.batch_size=16',
    '--config.train_for=6 steps',
    '--config.optimizer.warmup=2 steps',
    '--config.run.eval_batch_size=64',
    '--config.run.eval_every=6 steps',
    '--config.run.checkpoint_every=3 steps',
    '--config.run.log_every=2 steps',
  ]


def _forget_flags():
  """Undoes the parsing of an earlier command, and what it defined."""
  # A config file is loaded over the one before it, whose names would remain.
  sys.modules.pop('config_config', None)
  known = flags.FLAGS
  for name in list(known):
    if name.startswith('config.'):
      delattr(known, name)
  known.unparse_flags()
  for name in set(known) & {
    flag.name
    for module, defined in known.flags_by_module_dict().items()
    if 'nfnet_jax' in module or 'ml_collections' in module
    for flag in defined
  }:
    known[name].unparse()
