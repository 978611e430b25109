import pytest

from nfnet_jax.experiments import derive, errors, workdirs
from nfnet_jax.experiments.configs import digits
from nfnet_jax.models import registry


def resolve(config):
  return derive.resolve(config, registry.get_spec('nfnet_f1'), 'cpu')


def test_saved_config_reads_back_and_guards_its_workdir(tmp_path):
  config = resolve(digits.get_config())
  workdirs.check_same(config, tmp_path)
  workdirs.save(config, tmp_path, ['0'])
  assert workdirs.load(tmp_path).to_dict() == config.to_dict()
  operational = digits.get_config()
  operational.run.log_every = '7 steps'
  operational.run.fast_stem = True
  workdirs.check_same(resolve(operational), tmp_path)
  other = digits.get_config()
  other.optimizer.clipping = 0.02
  with pytest.raises(
    errors.InputError, match=r'optimizer\.clipping: 0\.01 there, 0\.02 here'
  ):
    workdirs.check_same(resolve(other), tmp_path)
