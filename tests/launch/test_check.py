"""What is checked before a TPU is rented, and what the end of a script says."""

import os
import pathlib
import signal
import sys
import time

import pytest

from tests.launch import conftest

ROOT = pathlib.Path(__file__).parents[2]
MODULE = ['-m', 'nfnet_jax.experiments.check']
FLAGS = ['--config=f3', '--config.note=a "b" $HOME']
DELETE = (
  'PROJECT_ID=project ZONE=zone-a TPU_NAME=pod PROVISIONING={} launch/delete.sh'
)
SCRIPTS = ['create', 'supervise', 'check']


def cost_lines(err):
  return [line for line in err.splitlines() if 'costs money' in line]


@pytest.mark.parametrize('script', SCRIPTS)
def test_flags_are_checked_for_the_tpu(cloud, script):
  cloud(
    script,
    *FLAGS,
    PYTHON=cloud.python(),
    ACCELERATOR_TYPE='v4-64',
    PRICE_PER_CHIP_HOUR='1.2',
  )
  expected = ['--accelerator_type=v4-64', '--price_per_chip_hour=1.2']
  assert cloud.checked() == [*MODULE, *FLAGS, *expected]


@pytest.mark.parametrize(
  ('choice', 'expected'),
  [
    ('plan', [*MODULE, *FLAGS, '--accelerator_type=v3-128']),
    ('config', [*MODULE, *FLAGS, '--accelerator_type=v3-128', '--noplan']),
    ('none', []),
  ],
)
def test_check_or_its_plan_can_be_left_out(cloud, choice, expected):
  cloud('check', *FLAGS, CHECK=choice, PYTHON=cloud.python())
  assert cloud.checked() == expected


@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize('code', [1, 2])
def test_nothing_is_rented_if_the_check_fails(cloud, script, code):
  python = cloud.python(code)
  _, err = cloud(script, *FLAGS, code=code, PYTHON=python)
  assert cloud.calls == []
  # Bad input is explained by the command itself, in one line.
  assert ('CHECK=config leaves' in err) == (code != 2)
  assert len(err.splitlines()) == int(code != 2)


@pytest.mark.slow
def test_real_check_refuses_an_unknown_config(cloud):
  here = {'PYTHON': sys.executable, 'PYTHONPATH': str(ROOT)}
  _, err = cloud('supervise', '--config=f33', code=2, **here)
  (line,) = err.splitlines()
  assert "Unknown config 'f33'. Did you mean 'f3'?" in line
  assert cloud.calls == []


@pytest.mark.parametrize('python', ['missing', 'without the package'])
def test_check_is_left_out_without_the_package(cloud, python):
  settings = {}
  if python != 'missing':
    settings['PYTHON'] = cloud.python(imports=False)
  _, err = cloud('create', *FLAGS, **settings)
  (line,) = [line for line in err.splitlines() if 'not checked' in line]
  assert "pip install -c constraints.txt '.[plan]'" in line
  assert cloud.verbs == ['create']
  assert cloud.checked() == []


def test_create_without_flags_checks_nothing(cloud):
  cloud('create', PYTHON=cloud.python(2))
  assert cloud.checked() == []


def test_dry_run_prints_the_check(cloud):
  out, _ = cloud('create', '--dry_run', '--config=f3', PYTHON=cloud.python())
  first = out.splitlines()[0]
  assert first.endswith(
    '/bin/python -m nfnet_jax.experiments.check --config=f3 '
    '--accelerator_type=v3-128'
  )
  assert cloud.checked() == []


@pytest.mark.parametrize(
  ('provisioning', 'program', 'code'),
  [
    pytest.param('on_demand', {}, 0, marks=pytest.mark.slow),
    ('on_demand', {'code': 2}, 2),
    ('queued_spot', {}, 0),
    pytest.param('queued_spot', {'code': 2}, 2, marks=pytest.mark.slow),
  ],
)
def test_tpu_is_deleted_when_training_is_done(
  cloud, provisioning, program, code
):
  cloud.program(program)
  settings = {'PROVISIONING': provisioning}
  cloud.ready(**settings)
  _, err = cloud('supervise', code=code, DELETE_WHEN_DONE='1', **settings)
  assert cloud.verbs[-1] == 'delete'
  assert err.endswith('pod is deleted.\n')
  assert cost_lines(err) == []
  assert not (cloud.fake / 'w-0').exists()


@pytest.mark.parametrize(
  ('program', 'code'),
  [({}, 0), pytest.param({'code': 2}, 2, marks=pytest.mark.slow)],
)
def test_end_says_that_the_tpu_still_exists(cloud, program, code):
  cloud.program(program)
  settings = {'PROVISIONING': 'queued'}
  cloud.ready(**settings)
  _, err = cloud('supervise', code=code, **settings)
  (line,) = cost_lines(err)
  assert line == (
    'launch: pod still exists. It costs money until you delete it: '
    + DELETE.format('queued')
  )
  assert err.endswith(line + '\n')
  assert 'delete' not in cloud.verbs


@pytest.mark.slow
def test_failure_keeps_the_tpu_and_says_so(cloud):
  cloud.program({'code': 1})
  cloud.ready()
  _, err = cloud('supervise', code=1, DELETE_WHEN_DONE='1')
  assert 'pod still exists. It costs money' in err.splitlines()[-1]
  assert 'delete' not in cloud.verbs


@pytest.mark.slow
def test_bad_settings_after_creating_delete_the_tpu(cloud):
  bad = {'MOUNT_POINT': '/mnt/data', 'DATA_DIR': 'gs://bucket'}
  _, err = cloud('supervise', code=2, DELETE_WHEN_DONE='1', **bad)
  assert 'Bad settings' in err
  assert cloud.verbs[-1] == 'delete'
  assert err.endswith('pod is deleted.\n')


def test_refused_accelerator_leaves_nothing_to_delete(cloud):
  _, err = cloud('supervise', code=2, ACCELERATOR_TYPE='tpu7x-128')
  assert cost_lines(err) == []
  assert cloud.verbs == []


@pytest.mark.slow
def test_failed_deletion_is_retried(cloud):
  cloud.ready()
  cloud.plan(tpu_vm__delete=[{'err': 'UNAVAILABLE: no'}])
  _, err = cloud('supervise', DELETE_WHEN_DONE='1')
  assert 'That failed (1 of 5)' in err
  assert cloud.verbs.count('delete') == 2
  assert err.endswith('pod is deleted.\n')


def test_deletion_that_keeps_failing_is_an_error(cloud):
  cloud.ready()
  cloud.plan(tpu_vm__delete=[{'err': 'PERMISSION_DENIED: no'}] * 9)
  _, err = cloud('supervise', code=1, RETRIES='2', DELETE_WHEN_DONE='1')
  assert 'Training is done.' in err
  assert '2 deletions failed in a row.' in err
  assert 'pod may still exist. It costs money' in err.splitlines()[-1]


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_interrupted_supervision_says_that_the_tpu_still_exists(cloud, number):
  cloud.program({'seconds': 60})
  cloud.ready()
  cloud('train')
  asleep = cloud.fake / 'asleep'
  conftest.write_scripts(
    cloud.bin, {'sleep': f'touch {asleep}; exec /bin/sleep 60'}
  )
  run = cloud.start('supervise')
  deadline = time.monotonic() + 60
  while not asleep.exists():
    assert time.monotonic() < deadline
    time.sleep(0.02)
  os.killpg(run.pid, number)
  _, err = run.communicate(timeout=60)
  assert run.returncode == -number
  assert 'pod still exists. It costs money' in err.splitlines()[-1]


@pytest.mark.parametrize('script', ['watch', 'stop'])
def test_end_of_training_says_that_the_tpu_still_exists(cloud, script):
  cloud.ready()
  cloud('train')
  _, err = cloud(script)
  assert len(cost_lines(err)) == 1


def test_create_says_what_the_tpu_costs(cloud):
  _, err = cloud('create')
  assert 'pod exists. It costs money' in cost_lines(err)[0]


def test_failed_create_says_that_there_may_be_a_tpu(cloud):
  cloud.plan(tpu_vm__create=[{'hang': True}])
  _, err = cloud('create', code=124, CREATE_TIMEOUT='1')
  assert 'pod may exist. It costs money' in cost_lines(err)[0]
