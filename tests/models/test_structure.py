"""Every variant's parameters, sizes and multiply-adds, against golden files.

`python -m tests.models.test_structure` writes the golden file anew.
"""

import functools
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

import nfnet_jax
from nfnet_jax.models import complexity, registry
from nfnet_jax.optim import paths

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
STRUCTURE = GOLDEN / 'structure.json'
REGENERATE = (
  'The structure changed. If that is meant, run '
  "'python -m tests.models.test_structure' and look at the difference."
)


@functools.cache
def abstract_params(name):
  """The published classifier's parameters as shapes, and its state's."""
  model = nfnet_jax.create(name)
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  init = lambda key, images: model.init(key, images, False)
  return jax.eval_shape(init, jax.random.key(0), images)


def describe(name):
  """What the golden file holds of a model."""
  params, state = abstract_params(name)
  spec = registry.get_spec(name)
  model = nfnet_jax.create(name)
  images = jax.ShapeDtypeStruct(
    (1, spec.test_size, spec.test_size, 3), jnp.float32
  )
  macs = complexity.count_macs(
    lambda p, i: model.apply(p, state, None, i, False)[0], params, images
  )
  listing = [
    f'{path} {list(leaf.shape)} {leaf.dtype}'
    for path, leaf in paths.named_leaves(params)
  ]
  return {
    'leaves': len(listing),
    'parameters': complexity.count_parameters(params),
    'macs_at_test_size': macs,
    'train_size': spec.train_size,
    'test_size': spec.test_size,
    'sha256_of_paths_and_shapes': hashlib.sha256(
      '\n'.join(listing).encode()
    ).hexdigest(),
  }


@pytest.mark.parametrize('name', nfnet_jax.list_models())
def test_structure_is_golden(name):
  golden = json.loads(STRUCTURE.read_text())
  assert describe(name) == golden.get(name), REGENERATE


def test_golden_file_has_no_other_models():
  assert set(json.loads(STRUCTURE.read_text())) == set(nfnet_jax.list_models())


def test_f0_tree_is_the_published_one():
  published = json.loads((GOLDEN / 'published_f0_paths.json').read_text())
  params, state = abstract_params('nfnet_f0')
  ours = {
    module: {name: list(leaf.shape) for name, leaf in leaves.items()}
    for module, leaves in params.items()
  }
  assert ours == published
  assert not jax.tree.leaves(state)


# arXiv 2102.06171, table 3: millions of parameters and billions of
# multiply-adds at the test size; exact counts from the released code.
@pytest.mark.parametrize(
  ('name', 'parameters', 'gmacs'),
  [
    ('nfnet_f0', 71_489_284, 12.38),
    ('nfnet_f1', 132_634_256, 35.54),
    ('nfnet_f2', 193_779_228, 62.59),
    ('nfnet_f3', 254_924_200, 114.76),
    ('nfnet_f4', 316_069_172, 215.24),
    ('nfnet_f5', 377_214_144, 289.76),
    ('nfnet_f6', 438_359_116, 377.28),
    ('nfnet_f7', 499_504_088, 478.78),
    ('nfnet_f0_plus', 118_824_516, 19.52),
    ('nfnet_f1_plus', 220_357_008, 55.45),
    ('nfnet_f2_plus', 321_889_500, 97.28),
    ('nfnet_f3_plus', 423_421_992, 177.99),
    ('nfnet_f4_plus', 524_954_484, 333.39),
    ('nfnet_f5_plus', 626_486_976, 448.43),
    ('nfnet_f6_plus', 728_019_468, 583.52),
    ('nfnet_f7_plus', 829_551_960, 740.16),
  ],
)
def test_golden_numbers_are_the_published_ones(name, parameters, gmacs):
  golden = json.loads(STRUCTURE.read_text())[name]
  assert golden['parameters'] == parameters
  assert round(golden['macs_at_test_size'] / 1e9, 2) == gmacs


def test_class_count_changes_the_classifier_only():
  model = nfnet_jax.create('nfnet_pico', num_classes=7)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  params, _ = jax.eval_shape(
    lambda key, i: model.init(key, i, False), jax.random.key(0), images
  )
  other, _ = abstract_params('nfnet_pico')
  changed = [
    path
    for (path, ours), (_, theirs) in zip(
      paths.named_leaves(params), paths.named_leaves(other)
    )
    if ours.shape != theirs.shape
  ]
  assert changed == ['NFNet/~/linear/b', 'NFNet/~/linear/w']


def test_unknown_names_are_explained():
  with pytest.raises(ValueError, match=r"'nfnet_f9'; known: .*nfnet_f7"):
    nfnet_jax.create('nfnet_f9')


def write_golden():
  """Writes `golden/structure.json` from the models as they are."""
  rows = {name: describe(name) for name in nfnet_jax.list_models()}
  STRUCTURE.write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
  write_golden()
