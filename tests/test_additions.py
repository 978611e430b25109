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
      w_init=hk.initializers.RandomNormal(0, 0.01),
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
      '    image = preprocess.resize(image, size)\n',
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
}
CLIPPING = {
  'optim/clipping.py': [
    (
      "  'global_norm': ClippingRule(",
      "  'value': ClippingRule(\n"
      "    'Each element of the gradient.', 0.5,\n"
      '    lambda clipping, eps, groups: optax.clip(clipping),\n'
      '  ),\n',
    ),
  ]
}
CHECK = """
import io, json, contextlib
import jax, numpy as np
import nfnet_jax
from nfnet_jax.config import base, lookup, settings
from nfnet_jax.config import experiment as experiment_lib
from nfnet_jax.config import steps
from nfnet_jax.weights import load, identify

def prepare(**settings):
  return steps.prepare_config(
    lookup.load('digits', {'run.data_dir': DATA_DIR, **settings}), devices=1)

def train_shapes(config):
  return steps.open_experiment(config, devices=1).abstract_state()

found = {}
config = prepare(**{'model.name': 'nfnet_pico', 'model.logit_scale': 2.0})
experiment = steps.open_experiment(config, devices=1)
found['option'] = experiment.model.spec.options['logit_scale'].description
found['tiny'] = list(train_shapes(prepare(
  **{'model.name': 'tiny_pico', 'model.channels': 5})).params)
model = nfnet_jax.create_model('tiny_pico', num_classes=3)
images = np.zeros((1, 32, 32, 3), np.float32)
params, state = model.init(jax.random.key(0), images, False)
found['identified'] = identify.identify(params, state)
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
page = settings.format_page()
found['settings'] = [name for name in (
  'model.logit_scale', 'model.channels', 'data.grey', 'data.eval_mirror')
  if f'`{name}`' in page]
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
def found(tmp_path_factory, data_dir):
  folder = tmp_path_factory.mktemp('copy')
  package = folder / 'nfnet_jax'
  shutil.copytree(ROOT / 'nfnet_jax', package)
  for edits in (MODEL_OPTION, FAMILY, AUGMENTATION, EVALUATION, CLIPPING):
    apply(package, edits)
  run = subprocess.run(
    [sys.executable, '-c', f'DATA_DIR = {data_dir!r}\n{CHECK}'],
    env={**os.environ, 'PYTHONPATH': str(folder)},
    cwd=folder,
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stderr
  return json.loads(run.stdout.splitlines()[-1])


def test_a_model_option_is_one_file(found):
  assert len(MODEL_OPTION) == 1
  assert found['option'] == 'Factor of the features.'


def test_a_family_is_its_file_and_one_entry(found):
  assert len(FAMILY) == 2
  assert found['tiny'] == ['Tiny/~/conv', 'Tiny/~/linear']
  assert found['identified'] == ['tiny_pico', 3]


def test_an_augmentation_is_two_files(found):
  assert len(AUGMENTATION) == 2
  assert found['grey']
  assert 'grey' in found['described']


def test_an_evaluation_option_is_two_files(found):
  assert len(EVALUATION) == 2
  assert found['mirrored']


def test_a_clipping_rule_is_one_file(found):
  assert len(CLIPPING) == 1
  assert found['clipping'] == 0.5


def test_all_of_them_are_settings(found):
  assert len(found['settings']) == 4
