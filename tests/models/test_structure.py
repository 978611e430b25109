"""Every model's tree, sizes and multiply-adds, against golden files."""

import json

import jax
import jax.numpy as jnp
import pytest

from nfnet_jax import trees
from nfnet_jax.models import registry
from nfnet_jax.optim import groups
from tests.models import families, regenerate

# Tracing a deep network takes seconds. These are one network of every kind.
QUICK = {
  *families.PICOS,
  'nfnet_nano',
  'nfnet_f0',
  'nfnet_f0_plus',
  'nfnet_f0_bn',
  'nf_resnet50',
  'bn_resnet50',
}


def mark(name):
  return pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


MODELS = [
  mark(name) for names in registry.FAMILIES.values() for name in names.values()
]
# Parameter paths of the weights that the paper's authors published.
PUBLISHED = sorted(
  path.stem.removeprefix('published_').removesuffix('_paths')
  for path in regenerate.GOLDEN.glob('published_*_paths.json')
)


@pytest.mark.parametrize('name', MODELS)
def test_structure_is_golden(name):
  golden = regenerate.read_golden().get(name)
  assert regenerate.describe(name) == golden, (
    f"The structure of '{name}' changed. If that is meant, run 'python -m "
    f"tests.models.regenerate {name}' and look at the difference."
  )


def test_golden_file_has_no_other_models():
  names = {
    name for names in registry.FAMILIES.values() for name in names.values()
  }
  assert set(regenerate.read_golden()) == names, (
    "Run 'python -m tests.models.regenerate NAME' for a new model."
  )


def test_regenerates_one_model_only(tmp_path):
  path = tmp_path / 'structure.json'
  golden = regenerate.read_golden()
  stale = {**golden, 'nfnet_pico': {}, 'nfnet_nano': {}, 'gone': {}}
  path.write_text(json.dumps(stale))
  regenerate.regenerate(['nfnet_pico'], path)
  assert json.loads(path.read_text()) == {**golden, 'nfnet_nano': {}}
  with pytest.raises(SystemExit, match='nfnet_f99'):
    regenerate.regenerate(['nfnet_f99'], path)


@pytest.mark.parametrize('name', PUBLISHED)
def test_tree_is_the_published_one(name):
  path = regenerate.GOLDEN / f'published_{name}_paths.json'
  published = json.loads(path.read_text())
  params, state, _ = regenerate.trace(name)
  ours = {
    module: {name: list(leaf.shape) for name, leaf in leaves.items()}
    for module, leaves in (*params.items(), *state.items())
  }
  assert ours == published


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
  golden = regenerate.read_golden()[name]
  assert golden['parameters'] == parameters
  assert round(golden['macs_at_test_size'] / 1e9, 2) == gmacs


# Arithmetic on the released code: millions of parameters, and billions of
# multiply-adds at the test size where the map's sides divide evenly. That
# arithmetic has half pixels for B2 and B5 (1.10 and 10.56).
@pytest.mark.parametrize(
  ('name', 'mega_parameters', 'gmacs'),
  [
    ('nfnet_f0_baseline', 60.8, None),
    ('nfnet_f1_baseline', 107.6, None),
    ('nfnet_f2_baseline', 154.4, None),
    ('nfnet_f3_baseline', 201.3, None),
    ('nfnet_f0_modified_width', 62.8, None),
    ('nfnet_f1_modified_width', 115.2, None),
    ('nfnet_f2_modified_width', 167.6, None),
    ('nfnet_f3_modified_width', 220.1, None),
    ('nfnet_f0_default_width', 68.6, None),
    ('nfnet_f1_default_width', 123.3, None),
    ('nfnet_f2_default_width', 177.9, None),
    ('nfnet_f3_default_width', 232.6, None),
    ('nf_resnet50', 25.56, None),
    ('nf_resnet101', 44.55, None),
    ('nf_resnet152', 60.19, None),
    ('nf_resnet200', 64.67, None),
    ('nf_resnet288', 146.46, None),
    ('nf_resnet600', 300.65, None),
    ('bn_resnet50', 25.55, None),
    ('bn_resnet101', 44.54, None),
    ('bn_resnet152', 60.19, None),
    ('bn_resnet200', 64.67, None),
    ('bn_resnet288', 146.45, None),
    ('bn_resnet600', 300.64, None),
    ('nf_regnet_b0', 8.60, 0.44),
    ('nf_regnet_b1', 10.02, 0.73),
    ('nf_regnet_b2', 13.79, None),
    ('nf_regnet_b3', 18.14, 2.00),
    ('nf_regnet_b4', 29.32, 4.47),
    ('nf_regnet_b5', 48.71, None),
  ],
)
def test_golden_numbers_of_the_other_families(name, mega_parameters, gmacs):
  golden = regenerate.read_golden()[name]
  digits = 1 if name.startswith('nfnet') else 2
  assert round(golden['parameters'] / 1e6, digits) == mega_parameters
  if gmacs is not None:
    assert round(golden['macs_at_test_size'] / 1e9, 2) == gmacs


# Parameters: Keras and torchvision. Multiply-adds: arXiv 2102.06171, table 3,
# where EfficientNets are quoted to two digits and less.
@pytest.mark.parametrize(
  ('name', 'parameters', 'gmacs', 'tolerance'),
  [
    ('resnet50', 25_557_032, 4.10, 0.003),
    ('senet50', 28_088_024, 4.09, 0.001),
    ('efficientnet_b0', 5_288_548, 0.39, 0.02),
    ('efficientnet_b3', 12_233_232, 1.80, 0.02),
    ('efficientnet_b4', 19_341_616, 4.20, 0.05),
    ('efficientnet_b5', 30_389_784, 9.90, 0.04),
    ('efficientnet_b6', 43_040_704, 19.0, 0.01),
    ('efficientnet_b7', 66_347_960, 37.0, 0.03),
  ],
)
def test_golden_numbers_of_known_networks(name, parameters, gmacs, tolerance):
  golden = regenerate.read_golden()[name]
  assert golden['parameters'] == parameters
  macs = golden['macs_at_test_size'] / 1e9
  assert abs(macs / gmacs - 1) < tolerance


@pytest.mark.parametrize('name', MODELS)
def test_every_parameter_is_in_one_group(name):
  params, state, _ = regenerate.trace(name)
  spec = registry.get_model_spec(name)
  assert {path.partition('/')[0] for path in params} == {spec.root}
  members: dict[str, list[str]] = {
    group.name: [] for group in groups.NFNET_GROUPS
  }
  for path, _ in trees.named_leaves(params):
    members[groups.group_of(path).name].append(path)
  (kernel,) = members['classifier kernel']
  assert kernel.endswith('/~/linear/w')
  assert params[kernel[: -len('/w')]]['w'].shape[-1] == 1000
  assert all(path.endswith('/w') for path in members['kernels'])
  offsets = [path for path in members['gains and biases'] if '/offset' in path]
  assert bool(offsets) == bool(state) == spec.uses_batch_statistics


def test_class_count_changes_the_classifier_only():
  model = registry.create_model('nfnet_pico', num_classes=7)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  params, _ = jax.eval_shape(
    lambda key, i: model.init(key, i, False), jax.random.key(0), images
  )
  other, _, _ = regenerate.trace('nfnet_pico')
  changed = [
    path
    for (path, ours), (_, theirs) in zip(
      trees.named_leaves(params), trees.named_leaves(other)
    )
    if ours.shape != theirs.shape
  ]
  assert changed == ['NFNet/~/linear/b', 'NFNet/~/linear/w']
