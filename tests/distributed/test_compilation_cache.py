"""Tests that compiled programs are stored and that the next run reuses them."""

import json
import os
import subprocess
import sys

import jax
import pytest

from nfnet_jax.distributed import collectives, compilation_cache

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from nfnet_jax.distributed import compilation_cache

events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
if sys.argv[1:]:
  jax.default_backend = lambda: sys.argv[1]
cached = compilation_cache.enable_compilation_cache()
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
x = jax.jit(lambda x: jnp.sin(x @ x))(jnp.ones((8, 8)))
hits = events.count('/jax/compilation_cache/cache_hits')
print(json.dumps([cached, hits, x.tolist()]))
"""


@pytest.fixture(autouse=True)
def no_folder():
  """Remove the tests' own cache folder from the configuration during a test."""
  before = jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', None)
  yield
  jax.config.update('jax_compilation_cache_dir', before)


@pytest.fixture
def folder(monkeypatch, tmp_path):
  """The default folder of a TPU's programs."""
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  return tmp_path / 'nfnet_jax' / 'programs'


def run_program(cache, *platform):
  env = {name: os.environ[name] for name in ('PATH', 'JAX_PLATFORMS')}
  run = subprocess.run(
    [sys.executable, '-c', PROGRAM, *platform],
    env=env | cache,
    check=True,
    capture_output=True,
    text=True,
  )
  return json.loads(run.stdout)


def test_second_run_compiles_nothing(tmp_path):
  home = {'XDG_CACHE_HOME': str(tmp_path)}
  folder, hits, first = run_program(home, 'gpu')
  assert folder == str(tmp_path / 'nfnet_jax' / 'programs')
  assert hits == 0
  _, hits, second = run_program(home, 'gpu')
  assert hits > 0
  assert first == second


@pytest.mark.slow
def test_cpu_stores_programs_only_on_request(tmp_path):
  home = {'XDG_CACHE_HOME': str(tmp_path / 'home')}
  assert run_program(home)[:2] == [None, 0]
  assert not (tmp_path / 'home').exists()
  asked = home | {'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'asked')}
  assert run_program(asked)[:2] == [str(tmp_path / 'asked'), 0]
  assert run_program(asked)[1] > 0
  assert not (tmp_path / 'home').exists()


def test_configured_folder_overrides_the_default(folder, tmp_path):
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'mine'))
  assert compilation_cache.enable_compilation_cache() == str(tmp_path / 'mine')
  assert not folder.exists()
  jax.config.update('jax_compilation_cache_dir', 'gs://bucket/programs')
  assert compilation_cache.enable_compilation_cache() == 'gs://bucket/programs'
  jax.config.update('jax_compilation_cache_dir', '')
  assert compilation_cache.enable_compilation_cache() is None


def test_default_folder_is_in_the_home_directory(monkeypatch, tmp_path):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.setenv('HOME', str(tmp_path))
  assert (
    compilation_cache.enable_compilation_cache()
    == f'{tmp_path}/.cache/nfnet_jax/programs'
  )
  assert (
    jax.config.jax_compilation_cache_dir
    == compilation_cache.enable_compilation_cache()
  )


def test_check_leaves_no_file_in_the_folder(folder):
  compilation_cache.enable_compilation_cache()
  assert list(folder.iterdir()) == []


def test_unwritable_folder_is_not_used(monkeypatch, folder):
  monkeypatch.setenv('XDG_CACHE_HOME', '/dev/null')
  assert compilation_cache.enable_compilation_cache().startswith(
    "not kept: [Errno 20] Not a directory: '/"
  )
  assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize('is_shared', [True, False])
def test_several_processes_need_a_shared_folder(monkeypatch, folder, is_shared):
  # Another process sees the folder only if it is shared.
  gather = lambda value: [value, is_shared] if value is True else [value]
  monkeypatch.setattr(collectives, 'all_gather', gather)
  result = compilation_cache.enable_compilation_cache()
  if is_shared:
    assert result == jax.config.jax_compilation_cache_dir == str(folder)
  else:
    assert result.startswith(f'not kept: not all hosts see {folder}; ')
    assert jax.config.jax_compilation_cache_dir is None
