"""Shared fixtures. Tests run on eight CPU devices."""

import gc
import importlib.metadata
import os
import sys
import tempfile

from absl import flags
import pytest

from tests import buckets as buckets_lib

# Before anything imports JAX. All processes of the tests share compiled
# programs: the workers of pytest-xdist use the folder of their parent process.
_CACHE = tempfile.TemporaryDirectory()
os.environ['JAX_PLATFORMS'] = 'cpu'
# Tests spend more time on compilation than on computation.
os.environ['XLA_FLAGS'] = (
  '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
)
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  # It halves the time of compilation. Newer versions do not know this flag.
  os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false'
# Before anything imports TensorFlow. Commands set the same two variables.
os.environ.update(buckets_lib.SHORT_TIMEOUTS)
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
# Memory that one thread frees is reused by the others. Workers start with it.
os.environ['MALLOC_ARENA_MAX'] = '2'
if 'PYTEST_XDIST_WORKER' not in os.environ:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _CACHE.name
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'


def pytest_collection_finish():
  """Exempt the imported modules from garbage collections, which take long."""
  gc.collect()
  gc.freeze()


@pytest.fixture(scope='module', autouse=True)
def _clear_programs():
  """Free the programs that a test module compiled.

  Linux limits a process to 65,530 memory mappings.
  """
  yield
  gc.collect()
  if 'jax' in sys.modules:
    sys.modules['jax'].clear_caches()


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch):
  """Do not wait between two tries to read."""
  from nfnet_jax.storage import failures

  monkeypatch.setattr(failures, 'DELAYS_S', (0, 0, 0))


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
  # One server for all tests, because TensorStore and Orbax cache its address.
  with buckets_lib.Buckets(tmp_path_factory.mktemp('storage')) as buckets:
    yield buckets


@pytest.fixture
def buckets(_storage, monkeypatch):
  """A stand-in for Google Cloud Storage, a `buckets.Buckets`."""
  for name, value in _storage.environment.items():
    monkeypatch.setenv(name, value)
  monkeypatch.delenv('GOOGLE_APPLICATION_CREDENTIALS', raising=False)
  yield _storage
  _storage.clear_faults()


@pytest.fixture
def run_command(capfd, monkeypatch):
  """Return a function that runs a command in this process.

  `run_command(main, *arguments) -> (code, out, err)`, the exit code and the
  output of the command.
  """
  from nfnet_jax.cli import command

  def run(main, *arguments, **options):
    _reset_flags()
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


def _reset_flags():
  """Reset the flags that an earlier command parsed or defined."""
  # Otherwise the names of the previous config file would remain.
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
