"""Files from elsewhere, damaged at random: one line, and nothing else happens.

The memory of the process is limited meanwhile. Pickles are also tested in
`tests/weights/test_pickles.py`.
"""

import io
import json
import os
import pathlib
import resource

import hypothesis
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest

from nfnet_jax import errors, images, preprocessing
from nfnet_jax.config import workdir
from nfnet_jax.planning import hlo
from nfnet_jax.storage import lock
from nfnet_jax.training import goodput, metrics
from nfnet_jax.weights import load, network, save
from tests import trained_weights

pytestmark = [
  pytest.mark.full,
  pytest.mark.filterwarnings('ignore::UserWarning:PIL'),
]

EXTRA_BYTES = 2**31  # That a reader may allocate.
SETTINGS = hypothesis.settings(
  max_examples=int(os.environ.get('FUZZ_EXAMPLES', 1000)),
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
# Replaced bytes and their place, and the share that is cut off at the end.
damages = st.tuples(
  st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=8)), max_size=4),
  st.one_of(st.just(0.0), st.floats(0, 1)),
)


@pytest.fixture(autouse=True)
def _limited_memory():
  before = resource.getrlimit(resource.RLIMIT_AS)
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
  used = pages * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_BYTES, before[1]))
  yield
  resource.setrlimit(resource.RLIMIT_AS, before)


def damage(data, edits, cut):
  damaged = bytearray(data)
  for place, replacement in edits:
    start = int(place**4 * len(damaged))  # Headers are at the beginning.
    damaged[start : start + len(replacement)] = replacement
  return bytes(damaged[: len(damaged) - int(cut * len(damaged))])


def is_one_line(error):
  assert len(str(error).splitlines()) == 1, str(error)


@pytest.fixture(scope='module')
def weights_files(tmp_path_factory):
  """Weights of the smallest network in every kind of file."""
  folder = tmp_path_factory.mktemp('weights')
  _, weights = trained_weights.random_weights('nfnet_pico')
  files = {}
  for name in ('weights.npz', 'weights.safetensors', 'timm.safetensors'):
    layout = {'layout': 'timm'} if name.startswith('timm') else {}
    save.save_weights(folder / name, weights, **layout)
    files[name] = (folder / name).read_bytes()
  return files


@pytest.mark.parametrize(
  'name', ['weights.npz', 'weights.safetensors', 'timm.safetensors']
)
def test_weights(weights_files, tmp_path, name):
  path = tmp_path / name

  @SETTINGS
  @hypothesis.given(damages)
  def check(damages):
    path.write_bytes(damage(weights_files[name], *damages))
    try:
      load.load_weights(path)
    except network.WeightsError as error:
      is_one_line(error)

  check()


@pytest.mark.parametrize(
  'kind', ['JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'AVIF']
)
def test_images(tmp_path, kind):
  pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, kind)
  path = tmp_path / f'image.{kind.lower()}'

  @SETTINGS
  @hypothesis.given(damages)
  def check(damages):
    encoded = damage(buffer.getvalue(), *damages)
    path.write_bytes(encoded)
    try:
      images.preprocess(
        str(path), preprocessing.EvalPreprocessing(32, 'squash', 4)
      )
    except images.ImageError as error:
      is_one_line(error)
    assert len(images.find_fault(encoded).splitlines()) <= 1

  check()


def test_files_of_a_run(tmp_path):
  config = pathlib.Path(__file__).parent / 'golden/old_run_config.json'
  row = json.dumps({'step': 1, 'loss': 2.0, 'eval/top1': 0.5}) + '\n'
  start = json.dumps(
    {'began': 1, 'ended': 2, 'first_step': 0, 'step': 3, 'seconds': {}}
  )
  readers = {
    'config.json': (config.read_bytes(), lambda: workdir.load(tmp_path)),
    'metrics.jsonl': (
      row.encode() * 3,
      lambda: metrics.read_metrics(tmp_path / 'metrics.jsonl'),
    ),
    goodput.FILE: (
      start.encode() + b'\n',
      lambda: goodput.Goodput(tmp_path).shares(),
    ),
    lock.FILE: (b'{"host": "a", "process": 1}', lambda: lock_once(tmp_path)),
  }

  @SETTINGS
  @hypothesis.given(st.sampled_from(sorted(readers)), damages)
  def check(name, damages):
    data, read = readers[name]
    (tmp_path / name).write_bytes(damage(data, *damages))
    try:
      read()
    except errors.InputError as error:
      is_one_line(error)

  check()


def lock_once(folder):
  with lock.lock_folder(folder):
    pass


def test_hlo():
  folder = pathlib.Path(__file__).parent / 'planning' / 'fixtures'
  text = (folder / 'step.hlo').read_text()

  @SETTINGS
  @hypothesis.given(damages)
  def check(damages):
    damaged = damage(text.encode(), *damages).decode('latin-1')
    try:
      hlo.parse(damaged)
    except ValueError as error:
      is_one_line(error)

  check()
