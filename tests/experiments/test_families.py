"""Commands and configs of every family of models."""

import csv
import json

import numpy as np
import pytest

from nfnet_jax import errors
from nfnet_jax.config import lookup, steps
from nfnet_jax.experiments import evaluate, models, signal_propagation, train
from nfnet_jax.experiments.configs import (
  efficientnet,
  ladder,
  light_nfnet,
  nf_regnet,
  nfnet,
  resnet,
)
from nfnet_jax.models import (
  bn_resnet,
  complexity,
  fixup_resnet,
  nf_resnet,
  registry,
  skipinit_resnet,
)
from nfnet_jax.models import efficientnet as efficientnet_lib
from nfnet_jax.models import nf_regnet as nf_regnet_lib
from tests import trained_weights

# Smallest models -> settings to train them with, other than the defaults.
_SETTINGS = {
  'nf_resnet_pico': ['--config.model.se_ratio=0.25'],
  'nf_regnet_pico': ['--config.optimizer.clip_by=layer'],
  'senet_pico': ['--config.optimizer.trust_coefficient=0.001'],
  'efficientnet_pico': ['--config.optimizer.rms_decay=0.9'],
  'nfnet_pico_bn': ['--config.optimizer.clip_by=global_norm'],
}


def specs_of(*families):
  """Return the models of families, without those for tests."""
  specs = map(registry.get_model_spec, registry.list_models())
  return [
    spec
    for spec in specs
    if spec.family in families and 'pico' not in spec.name
  ]


@pytest.mark.parametrize(
  ('name', 'flags'),
  [
    pytest.param(
      'bn_resnet_pico',
      ['--config.model.cross_replica_bn=True'],
      marks=pytest.mark.slow,
    ),
    *(
      pytest.param(name, _SETTINGS.get(name, []), marks=pytest.mark.full)
      for name in registry.list_models()
      # `nfnet_pico` is trained by the tests of the commands.
      if 'pico' in name and name != 'nfnet_pico'
    ),
  ],
)
def test_family_trains_resumes_and_evaluates(
  run_command, small, tmp_path, name, flags
):
  # `small` names a fast path that only NFNets have.
  flags = [*small, '--config.run.fast_paths=auto', *flags]
  flags.append(f'--config.model.name={name}')
  whole, parts = (f'--workdir={tmp_path / run}' for run in ('whole', 'parts'))
  code, out, err = run_command(train.main, *flags, whole, '--json')
  assert code == 0, err
  trained = json.loads(out)
  assert np.isfinite(trained['loss'])
  code, out, _ = run_command(evaluate.main, whole, '--json', on_a_run=True)
  evaluated = json.loads(out)
  assert 'top1' in evaluated
  assert evaluated.items() <= trained.items()
  # From the checkpoint of step 3 on, in a workdir that holds little more.
  (tmp_path / 'parts').mkdir()
  checkpoints = tmp_path / 'parts' / 'checkpoints'
  checkpoints.mkdir()
  (tmp_path / 'whole' / 'checkpoints' / '3').rename(checkpoints / '3')
  (tmp_path / 'whole' / 'config.json').rename(tmp_path / 'parts/config.json')
  code, out, err = run_command(train.main, *flags, parts, '--json')
  assert (code, 'Resuming after step 3' in err) == (0, True)
  assert evaluated.items() <= json.loads(out).items()


def resolved(config):
  return steps.prepare_config(config)


def test_resnets():
  for spec in specs_of(
    nf_resnet.NFResNet,
    fixup_resnet.FixUpResNet,
    skipinit_resnet.SkipInitResNet,
    bn_resnet.BNResNet,
    bn_resnet.ResNetV1,
  ):
    config = resnet.get_config(spec.name)
    config.batch_size = 256
    config = resolved(config)
    assert config.optimizer.learning_rate == 0.1
    assert config.data.randaugment_layers == 0
    assert not config.data.mixup
    assert config.optimizer.clipping == 0
    assert config.data.image_size == spec.train_size
    assert config.data.eval_size == spec.test_size
    assert config.data.eval_crop == 'centre'
    assert config.ema_decay == 0


def test_light_nfnets():
  published = resolved(nfnet.get_config('f3'))
  for name in ('nfnet_l0', 'eca_nfnet_l3'):
    config = resolved(light_nfnet.get_config(name))
    spec = registry.get_model_spec(name)
    assert config.data.image_size == spec.train_size
    assert (config.data.eval_crop, config.data.eval_margin) == ('centre', 0)
  assert config.optimizer == published.optimizer
  assert config.data.randaugment_magnitude == 15
  with pytest.raises(ValueError, match="'l9' is not a light NFNet"):
    light_nfnet.get_config('l9')


def test_nf_regnets():
  for spec in specs_of(nf_regnet_lib.NFRegNet):
    config = nf_regnet.get_config(spec.variant)
    config.batch_size = 512
    config = resolved(config)
    assert config.optimizer.learning_rate == 0.4
    assert config.optimizer.final_learning_rate == 0.001
    assert config.data.image_size == spec.train_size
    assert config.data.mixup
    assert config.data.randaugment_layers == 0


def test_efficientnets():
  for spec in specs_of(efficientnet_lib.EfficientNet):
    config = efficientnet.get_config(spec.variant)
    assert resolved(config).optimizer.learning_rate == 0.256
    config.batch_size = 2048
    config = resolved(config)
    assert config.optimizer.learning_rate == 0.128
    assert config.data.randaugment_layers == 2
    assert config.data.image_size == spec.train_size


@pytest.mark.parametrize('depth', ['f0', 'f3'])
def test_every_ablation_step_is_reported(depth):
  for step in ladder._STEPS:
    config = resolved(ladder.get_config(f'{depth}_{step}'))
    augmented = step in ('randaugment', 'cutmix', 'default_width', 'bn')
    assert (config.data.randaugment_layers == 4) == augmented
    assert config.model.name.startswith(f'nfnet_{depth}')
    assert f'\n  {step} ' in ladder.__doc__
  cutmix = resolved(ladder.get_config(f'{depth}_cutmix')).to_dict()
  published = nfnet.get_config()
  published.model.name = f'nfnet_{depth}'
  assert cutmix == resolved(published).to_dict()


@pytest.mark.parametrize('step', ['f4_bn', 'f0', 'f0_relu'])
def test_unknown_ablation_step_is_refused(step):
  with pytest.raises(ValueError, match=f"'{step}' is not a step"):
    ladder.get_config(step)


def test_unknown_variant_is_refused():
  with pytest.raises(ValueError, match="'b9' is not a variant"):
    nf_regnet.get_config('b9')


@pytest.mark.parametrize(
  ('name', 'setting', 'value'),
  [
    ('nfnet_f0', 'se_ratio', 0.25),
    ('nf_resnet50', 'cross_replica_bn', True),
    ('bn_resnet50', 'skip_gain', 1.0),
    ('efficientnet_b0', 'activation', 'relu'),
  ],
)
def test_option_that_a_family_lacks_is_refused(name, setting, value):
  config = nfnet.get_config()
  config.model.name = name
  config.model[setting] = value
  with pytest.raises(
    errors.InputError, match=f'model.{setting} is not an option'
  ):
    resolved(config)


def test_unknown_activation_is_refused():
  config = nfnet.get_config()
  config.model.activation = 'rellu'
  with pytest.raises(errors.InputError, match='rellu'):
    resolved(config)


def test_table_of_models_without_a_pattern_is_complete(run_command):
  code, out, _ = run_command(models.main, takes='[PATTERN]')
  assert code == 0
  names = [line.split()[0] for line in out.splitlines()]
  assert names == ['model', *registry.list_models()]


def test_a_model_without_stored_sizes_is_traced(tmp_path, monkeypatch):
  expected = complexity.count_model('nf_resnet_pico')
  monkeypatch.setattr(complexity, 'STRUCTURE', tmp_path / 'none.json')
  (tmp_path / 'none.json').write_text('{}')
  assert complexity.count_model('nf_resnet_pico') == expected


def test_table_of_models(run_command):
  code, out, _ = run_command(models.main, 'nf_*_pico', takes='[PATTERN]')
  assert code == 0
  head, *lines = (line.split() for line in out.splitlines())
  assert head[:2] == ['model', 'parameters']
  names = [line[0] for line in lines]
  assert sorted(names) == ['nf_regnet_pico', 'nf_resnet_pico']
  code, out, _ = run_command(
    models.main, 'resnet50', '--json', takes='[PATTERN]'
  )
  row = json.loads(out)['resnet50']
  assert row['parameters'] == 25_557_032
  assert row['reported_top1'] == 78.6
  assert row['macs'] == pytest.approx(4.09e9, rel=0.01)
  code, _, err = run_command(models.main, 'vgg*', takes='[PATTERN]')
  assert code == 2
  assert "No model matches 'vgg*'. '*' matches all " in err


def read_table(path):
  with path.open() as file:
    return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    ('nf_resnet_pico', [1.04, 1.04, 1.08, 1.04, 1.04]),
    pytest.param(
      'bn_resnet_pico',
      [1.36, 1.36, 2.05, 1.36, 1.36],
      marks=pytest.mark.slow,
    ),
  ],
)
def test_signal_propagation(run_command, tmp_path, name, expected):
  code, out, err = run_command(
    signal_propagation.main,
    f'--model={name}',
    f'--out={tmp_path}/new',
    '--size=96',
  )
  assert code == 0, err
  paths = [f'{tmp_path}/new/{name}.{kind}' for kind in ('csv', 'png')]
  assert out.split() == paths
  rows = read_table(tmp_path / 'new' / f'{name}.csv')
  assert [round(float(row['expected_var']), 2) for row in rows] == expected
  # Few channels on small images: roughly.
  var = [float(row['var']) for row in rows]
  np.testing.assert_allclose(var, expected, rtol=0.35)


@pytest.mark.slow
def test_signal_propagation_of_a_run_on_images(run_command, data_dir, tmp_path):
  _, weights = trained_weights.random_weights('nfnet_pico')
  trained_weights.write_run(tmp_path / 'run', weights)
  flags = [
    f'--weights={tmp_path}/run',
    '--dataset=digits',
    f'--data_dir={data_dir}',
    f'--out={tmp_path}',
  ]
  tables = []
  for batch in (3, 8):  # A larger batch is not padded.
    code, _, err = run_command(
      signal_propagation.main, *flags, '--split=test[:3]', f'--batch={batch}'
    )
    assert code == 0, err
    tables.append(read_table(tmp_path / 'nfnet_pico.csv'))
  assert [row['block'] for row in tables[0]] == ['0', '1', '2', '3']
  assert tables[0] == tables[1]
  code, _, err = run_command(
    signal_propagation.main, *flags, '--split=test[:0]'
  )
  assert (code, "'test[:0]' of 'digits' has no images" in err) == (2, True)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], '--model=NAME or --weights=PATH'),
    (['--model=nf_resnet51'], "Unknown model 'nf_resnet51'"),
    pytest.param(
      ['--model=nfnet_pico', '--dataset=no_such'],
      'TFDS knows no dataset',
      marks=pytest.mark.slow,
    ),
  ],
)
def test_bad_input_to_signal_propagation(run_command, flags, message, tmp_path):
  code, _, err = run_command(
    signal_propagation.main, *flags, f'--out={tmp_path}'
  )
  assert code == 2
  assert message in err


@pytest.mark.slow
def test_a_table_is_written_whole_or_not_at_all(
  run_command, monkeypatch, tmp_path
):
  rows = [{'block': 0}, {'no_column': 1}]
  monkeypatch.setattr(signal_propagation, 'measure', lambda *network: rows)
  with pytest.raises(ValueError, match='no_column'):
    run_command(
      signal_propagation.main, '--model=nfnet_pico', f'--out={tmp_path}'
    )
  assert not list(tmp_path.iterdir())


def test_signal_propagation_to_a_bad_folder(run_command, monkeypatch):
  monkeypatch.delattr(signal_propagation, 'measure')  # Before any work.
  flags = '--model=nfnet_pico', '--out=/proc'
  code, out, err = run_command(signal_propagation.main, *flags)
  assert (code, out) == (2, '')
  assert err.startswith("nfnet_jax: --out='/proc': ")


def test_configs_are_listed():
  table = lookup.format_table()
  for name in ('resnet', 'nf_regnet', 'efficientnet', 'ladder', 'f7_plus'):
    assert f'\n{name} ' in f'\n{table}'
