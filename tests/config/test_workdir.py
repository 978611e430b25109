import pytest

from nfnet_jax import errors
from nfnet_jax.config import resolve as resolve_lib
from nfnet_jax.config import workdir as workdir_lib
from nfnet_jax.experiments.configs import digits
from nfnet_jax.models import registry


def resolve(config):
  return resolve_lib.resolve(
    config, registry.get_model_spec('nfnet_f1'), 'cpu', 8
  )


def test_saved_config_reads_back_and_guards_its_workdir(tmp_path):
  config = resolve(digits.get_config())
  workdir_lib.check_same(config, tmp_path)
  workdir_lib.save(config, tmp_path, ['0'])
  assert workdir_lib.load(tmp_path).to_dict() == config.to_dict()
  operational = digits.get_config()
  operational.run.log_every = '7 steps'
  operational.run.fast_stem = True
  workdir_lib.check_same(resolve(operational), tmp_path)
  other = digits.get_config()
  other.optimizer.clipping = 0.02
  with pytest.raises(
    errors.InputError, match=r'optimizer\.clipping: 0\.01 there, 0\.02 here'
  ):
    workdir_lib.check_same(resolve(other), tmp_path)
