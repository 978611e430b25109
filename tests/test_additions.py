"""The additions of CONTRIBUTING.md, made in a copy of the package.

Each edits as many files as CONTRIBUTING.md says, and then works everywhere.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# File -> (what is searched, what is put before it), or the text of a new file.
MODEL_OPTION = {
  'models/nfnet.py': [
    ("    name: str = 'NFNet',\n", '    logit_scale: float = 1.0,\n'),
    ('      name: Root of all', '      logit_scale: Factor of the features.\n'),
    (
      '    self.final_conv = ',
      '    self.logit_scale = logit_scale\n',
    ),
    (
      '    return self.activation(self.final_conv(x))\n',
      '    x = x * self.logit_scale\n',
    ),
  ]
}
FAMILY = {
  'models/tiny.py': '''
import dataclasses
import haiku as hk
import jax.numpy as jnp
from nfnet_jax.models import classifier

@dataclasses.dataclass(frozen=True)
class Variant:
  train_size: int = 32
  test_size: int = 32
  dropout: float = 0.0

VARIANTS = {'pico': Variant()}

class Tiny(classifier.ImageClassifier):
  """A convolution and a classifier."""

  variants = VARIANTS

  def __init__(
    self,
    num_classes: int = 1000,
    variant: str = 'pico',
    *,
    channels: int = 8,
    stochdepth_rate: float = 0.0,
    dropout_rate: float | None = None,
    name: str = 'Tiny',
  ):
    """Create the modules.

    Args:
      num_classes: Size of the logits.
      variant: A key of `VARIANTS`.
      channels: Channels of the convolution.
      stochdepth_rate: Not used.
      dropout_rate: Dropout rate on the features.
      name: Root of all parameter paths.
    """
    super().__init__(
      num_classes,
      variant,
      dropout_rate=dropout_rate,
      w_init=hk.initializers.RandomNormal(stddev=0.01),
      name=name,
    )
    self.depth, self.blocks = (), ()
    self.conv = hk.Conv2D(channels, 3, name='conv')

  def stem(self, images, is_training):
    return self.conv(images)

  def head(self, x, is_training):
    return jnp.maximum(x, 0)
''',
  'models/registry.py': [
    ('  nfnet.NFNet: {', "  tiny.Tiny: {'pico': 'tiny_pico'},\n"),
    ('  bn_nfnet,\n', '  tiny,\n'),
  ],
}
AUGMENTATION = {
  'preprocessing.py': [
    (
      '  shift: int = option(',
      "  grey: bool = option(False, 'Remove the colours.')\n",
    ),
    ("      f'shift {self.shift} px'", "      'grey' if self.grey else '',\n"),
  ],
  'data/examples.py': [
    (
      '    image = preprocess.resize(image, self._size)\n',
      '    if augmentation.grey:\n'
      '      image = tf.image.rgb_to_grayscale(image)\n'
      '      image = tf.image.grayscale_to_rgb(image)\n',
    ),
  ],
}
EVALUATION = {
  'preprocessing.py': [
    (
      "  crop: str = option('squash', 'Crop in evaluation.'",
      "  mirror: bool = option(False, 'Mirror images in evaluation.')\n",
    ),
  ],
  'data/preprocess.py': [
    (
      "  if preprocessing.crop == 'centre':\n    return resize(image, size)\n",
      '  if preprocessing.mirror:\n    image = image[:, ::-1]\n',
    ),
  ],
  'images.py': [
    (
      '  size, margin = preprocessing.size, preprocessing.margin\n',
      '  if preprocessing.mirror:\n    image = image[:, ::-1]\n',
    ),
  ],
}
CLIPPING = {
  'optim/clipping.py': [
    (
      "  'global_norm': ClippingRule(",
      "  'value': ClippingRule(\n"
      "    'Each element of the gradient.', 0.5,\n"
      '    lambda clipping, eps, groups, statistics: optax.clip(clipping),\n'
      '  ),\n',
    ),
  ]
}
MODELS = """
import json
import jax, numpy as np
import nfnet_jax
from nfnet_jax.config import settings
from nfnet_jax.weights import identify

scaled = nfnet_jax.create_model('nfnet_pico', logit_scale=2.0)
tiny = nfnet_jax.create_model('tiny_pico', num_classes=3)
images = np.zeros((1, 32, 32, 3), np.float32)
trees = jax.eval_shape(
  lambda key: tiny.init(key, images, False), jax.random.key(0))
page = settings.format_page()
print(json.dumps({
  'option': scaled.spec.options['logit_scale'].description,
  'identified': identify.identify(*trees),
  'settings': [name for name in (
    'model.logit_scale', 'model.channels', 'data.grey', 'data.eval_mirror')
    if f'`{name}`' in page],
}))
"""
RUNS = """
import json
import numpy as np
from nfnet_jax import images
from nfnet_jax.config import lookup, steps

def prepare(**settings):
  return steps.prepare_config(
    lookup.load('digits', {'run.data_dir': DATA_DIR, **settings}), devices=1)

def modules(**settings):
  experiment = steps.open_experiment(prepare(**settings), devices=1)
  return list(experiment.abstract_state().params)

found = {}
scaled = prepare(**{'model.name': 'nfnet_pico', 'model.logit_scale': 2.0})
found['option'] = scaled.model.logit_scale
found['tiny'] = modules(**{'model.name': 'tiny_pico', 'model.channels': 5})
grey = prepare(**{
  'data.grey': True, 'data.eval_mirror': True, 'optimizer.clip_by': 'value'})
experiment = steps.open_experiment(grey, devices=1)
image = next(experiment.train_batches(0, print))['image']
found['grey'] = bool((np.ptp(image, axis=-1) == 0).all())
found['described'] = experiment.augmentation.describe()
found['clipping'] = grey.optimizer.clipping
plain = steps.open_experiment(prepare(), devices=1)
mirrored, usual = (
  next(each.eval_batches(print))['image'] for each in (experiment, plain))
found['mirrored'] = bool(np.allclose(mirrored, usual[:, :, ::-1], atol=0.1))
picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
mirrored, usual = (
  images.crop(picture, each.preprocessing) for each in (experiment, plain))
found['mirrored'] &= bool(np.allclose(mirrored, usual[:, ::-1], atol=0.1))
print(json.dumps(found))
"""


def apply(package, edits):
  for name, changes in edits.items():
    path = package / name
    if isinstance(changes, str):
      path.write_text(changes)
      continue
    text = path.read_text()
    for place, addition in changes:
      assert text.count(place) == 1, (name, place, text.count(place))
      text = text.replace(place, addition + place)
    path.write_text(text)


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
  """A folder with a copy of the package that has all additions."""
  folder = tmp_path_factory.mktemp('copy')
  package = folder / 'nfnet_jax'
  shutil.copytree(ROOT / 'nfnet_jax', package)
  for edits in (MODEL_OPTION, FAMILY, AUGMENTATION, EVALUATION, CLIPPING):
    apply(package, edits)
  return folder


def run_python(folder, code):
  """Run code that prints an object; return that object."""
  run = subprocess.run(
    [sys.executable, '-c', code],
    env={**os.environ, 'PYTHONPATH': str(folder)},
    cwd=folder,
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stderr
  return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def runs(copy, data_dir):
  return run_python(copy, f'DATA_DIR = {data_dir!r}\n{RUNS}')


def test_additions_of_models_and_settings_are_known_everywhere(copy):
  assert len(MODEL_OPTION) == 1
  assert len(FAMILY) == 2
  found = run_python(copy, MODELS)
  assert found['option'] == 'Factor of the features.'
  assert found['identified'] == ['tiny_pico', 3]
  assert len(found['settings']) == 4


@pytest.mark.slow
def test_models_are_configured(runs):
  assert runs['option'] == 2
  assert runs['tiny'] == ['Tiny/~/conv', 'Tiny/~/linear']


@pytest.mark.slow
def test_an_augmentation_is_two_files(runs):
  assert len(AUGMENTATION) == 2
  assert runs['grey']
  assert 'grey' in runs['described']


@pytest.mark.slow
def test_an_evaluation_option_is_three_files(runs):
  assert len(EVALUATION) == 3
  assert runs['mirrored']


@pytest.mark.slow
def test_a_clipping_rule_is_one_file(runs):
  assert len(CLIPPING) == 1
  assert runs['clipping'] == 0.5
