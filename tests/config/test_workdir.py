import json
import pathlib

import pytest

from nfnet_jax import errors
from nfnet_jax.config import base, lookup, steps
from nfnet_jax.config import workdir as workdir_lib

# The configuration of the digits run that nfnet_jax 0.1.0 saved.
OLD_RUN = pathlib.Path(__file__).parents[1] / 'golden' / 'old_run_config.json'


def digits(**overrides):
  return lookup.load('digits', overrides)


def test_saved_config_reads_back_and_protects_its_workdir(tmp_path):
  config = steps.prepare_config(digits(), workdir=tmp_path)
  workdir_lib.save(config, tmp_path, ['0'])
  assert workdir_lib.load(tmp_path).to_dict() == config.to_dict()
  operational = digits(**{'run.log_every': '7 steps', 'run.fast_paths': 'none'})
  steps.prepare_config(operational, workdir=tmp_path)
  other = digits(**{'optimizer.clipping': 0.02})
  with pytest.raises(
    errors.InputError, match=r'optimizer\.clipping: 0\.01 there, 0\.02 here'
  ):
    steps.prepare_config(other, workdir=tmp_path)


def test_checkpoints_without_their_config_are_refused(tmp_path):
  (tmp_path / 'checkpoints').mkdir()
  steps.prepare_config(digits(), workdir=tmp_path)  # A run that saved nothing.
  (tmp_path / 'checkpoints' / '4').mkdir()
  with pytest.raises(
    errors.InputError, match=r'has checkpoints but no config\.json'
  ):
    steps.prepare_config(digits(), workdir=tmp_path)


def test_a_run_of_an_older_version_resumes(tmp_path):
  (tmp_path / 'config.json').write_text(OLD_RUN.read_text())
  saved = workdir_lib.load(tmp_path)
  assert saved.run.fast_paths == 'fused_blocks,fast_convs'
  model = {
    f'model.{name}': saved.model[name] for name in ('name', 'activation')
  }
  given = digits(**model)
  resolved = steps.prepare_config(given, workdir=tmp_path)
  assert resolved.optimizer.clipping == 0.01


def test_settings_that_a_run_does_not_know_have_their_defaults(tmp_path):
  old = json.loads(OLD_RUN.read_text())
  for name in ('label_smoothing', 'model.activation', 'data.flip'):
    *sections, last = name.split('.')
    place = old[sections[0]] if sections else old
    del place[last]
  (tmp_path / 'config.json').write_text(json.dumps(old))
  values = base.flat(workdir_lib.load(tmp_path))
  assert values['label_smoothing'] == 0.1
  assert values['model.activation'] is None
  assert values['data.flip'] is True


@pytest.mark.parametrize(
  ('data', 'problem'),
  [
    (b'{', 'it is not JSON'),
    (b'\x00\xff', 'it is not JSON'),
    (b'[]', 'not the configuration of a run'),
    (b'{"run": {}}', 'not the configuration of a run'),
    (b'{"run": {}, "model": 3}', 'not the configuration of a run'),
    (b'{"run": {}, "model": {"colour": 1}}', "no setting 'model.colour'"),
  ],
)
def test_a_damaged_config_is_bad_input(tmp_path, data, problem):
  (tmp_path / 'config.json').write_bytes(data)
  with pytest.raises(errors.InputError, match=problem) as info:
    workdir_lib.load(tmp_path)
  assert 'config.json' in str(info.value)
  assert 'Error' not in str(info.value)
