"""`launch/supervise.sh` for every way in which training can end."""

import time

import pytest

from tests.launch import conftest, fake_gcloud

BRING_UP = ['create', 'scp', 'ssh', 'ssh', 'ssh']
QUEUED = {'PROVISIONING': 'queued_spot'}


def changes(cloud):
  """Return the calls that change the TPU, without those to its workers."""
  return [verb for verb in cloud.verbs if verb != 'ssh']


def supervise(cloud, code=0, **settings):
  return cloud('supervise', '--config=f3', code=code, **settings)[1]


def test_creates_a_tpu_and_ends_when_training_is_done(cloud):
  cloud.program({'seconds': 0.3})
  err = supervise(cloud)
  assert 'pod is ABSENT: creating it.' in err
  assert 'Training is done.' in err
  assert cloud.verbs[:5] == BRING_UP
  assert changes(cloud) == ['create', 'scp']


@pytest.mark.parametrize(
  'settings',
  [pytest.param({'PROVISIONING': 'spot'}, marks=pytest.mark.slow), QUEUED],
)
def test_recreates_after_a_preemption_and_resumes(cloud, settings):
  cloud.program({'seconds': 60}, {'seconds': 0.3})
  cloud.ready(**settings)
  cloud('train', '--config=f3', **settings)
  kind = 'tpu-vm' if settings != QUEUED else 'queued-resources'
  replies = [None, None, {'preempt': True}]
  cloud.plan(**{f'{kind.replace("-", "_")}__describe': replies})
  err = supervise(cloud, **settings)
  assert 'pod is PREEMPTED' in err or 'pod is SUSPENDED' in err
  assert changes(cloud) == ['delete', 'create', 'scp']
  first, second = cloud.runs()
  assert first == second


@pytest.mark.slow
def test_recreated_tpus_run_the_first_commit(cloud):
  (cloud.repo / 'version').write_text('first')
  cloud.commit()
  cloud.program({'seconds': 60}, {'seconds': 1})
  cloud.ready()
  run = cloud.start('supervise')
  while len(cloud.calls) < 4:
    time.sleep(0.02)
  (cloud.repo / 'version').write_text('second')
  cloud.commit()
  cloud.plan(tpu_vm__describe=[{'preempt': True}])
  assert run.wait(30) == 0
  version = cloud.fake / 'w-1' / 'nfnet_jax' / 'source' / 'version'
  assert version.read_text() == 'first'
  assert changes(cloud) == ['scp', 'delete', 'create', 'scp']


def test_resumes_a_run_that_was_interrupted_and_saved(cloud):
  cloud.program({'code': 75}, {'code': 75}, {})
  cloud.ready()
  assert 'Training is done.' in supervise(cloud)
  assert [len(cloud.runs(w)) for w in ('w-0', 'w-1')] == [3, 3]


def test_does_not_retry_bad_input(cloud):
  cloud.program({'w-0': {'code': 1}, 'w-1': {'code': 2}})
  cloud.ready()
  assert 'Bad input: launch/watch.sh shows it.' in supervise(cloud, code=2)
  assert len(cloud.runs()) == 1


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    pytest.param(
      {'MOUNT_POINT': '/mnt/data'}, 'Set DATA_DIR,', marks=pytest.mark.slow
    ),
    (
      {'MOUNT_POINT': '/mnt/data', 'DATA_DIR': 'gs://bucket'},
      "DATA_DIR='gs://bucket' names no folder.",
    ),
  ],
)
def test_does_not_retry_bad_settings(cloud, settings, message):
  err = supervise(cloud, code=2, **settings)
  assert err.count(message) == 1
  *_, last, cost = err.splitlines()
  assert last.endswith('see the message of launch/resume.sh above.')
  assert 'pod still exists. It costs money' in cost
  assert 'attempt' not in err


@pytest.mark.slow
def test_failure_of_a_worker_is_not_a_bad_setting(cloud):
  """On a worker, `tar` and `uv` exit with 2 if the network fails."""
  cloud.plan(tpu_vm__ssh=[{'err': 'Failed to fetch', 'code': 2}])
  err = supervise(cloud)
  assert 'That failed (1 of 5)' in err
  assert 'Training is done.' in err


@pytest.mark.slow
def test_resumes_a_failure_only_after_a_new_checkpoint(cloud):
  cloud.program(
    {'code': 1, 'reach': 1000},
    {'code': 75},
    {'code': 1, 'reach': 2000},
    {'code': 134, 'begin': 3000},
  )
  cloud.ready()
  err = supervise(cloud, code=1)
  assert 'Training failed at checkpoint 1000.' in err
  assert 'Training failed at checkpoint 2000.' in err
  assert err.count('Training failed again at checkpoint 2000.') == 1
  assert len(cloud.runs()) == 4


def test_failure_before_any_checkpoint_is_retried_once(cloud):
  cloud.program({'code': 1})
  cloud.ready()
  err = supervise(cloud, code=1)
  assert 'Training failed again at checkpoint none.' in err
  assert len(cloud.runs()) == 2


@pytest.mark.slow
def test_failure_of_one_worker_is_a_failure(cloud):
  cloud.program({'w-0': {'code': 0}, 'w-1': {'code': 1}}, {})
  cloud.ready()
  err = supervise(cloud)
  assert 'Training failed at checkpoint none.' in err
  assert [len(cloud.runs(w)) for w in ('w-0', 'w-1')] == [2, 2]


@pytest.mark.slow
def test_run_that_ended_without_an_exit_code_is_a_failure(cloud):
  cloud.program({'code': 75}, {'seconds': 60}, {})
  cloud.ready()
  cloud('train')
  cloud('watch')  # Waits for the end.
  cloud('train')
  run = cloud.fake / 'w-0' / 'nfnet_jax' / 'run'
  fake_gcloud.end_group(int((run / 'pid').read_text()))
  err = supervise(cloud, STRAGGLER_TIMEOUT='0')
  assert 'is not training: 75 lost' in err
  assert 'Training failed at checkpoint none.' in err


@pytest.mark.slow
def test_stops_workers_that_wait_for_one_that_ended(cloud):
  cloud.program({'w-0': {'code': 75}, 'w-1': {'seconds': 60}}, {'seconds': 0.2})
  cloud.ready()
  err = supervise(cloud, STRAGGLER_TIMEOUT='1')
  assert 'A worker has ended and others still run: stopping them.' in err
  assert 'Training failed' not in err
  assert [len(cloud.runs(w)) for w in ('w-0', 'w-1')] == [2, 2]


@pytest.mark.slow
def test_retries_if_there_is_no_capacity(cloud):
  none = {'err': 'no capacity'}
  cloud.plan(tpu_vm__create=[none, none])
  err = supervise(cloud)
  assert err.count('ERROR: (gcloud) no capacity') == 2
  assert 'That failed (2 of 5)' in err
  assert changes(cloud) == ['create', 'create', 'create', 'scp']


@pytest.mark.slow
def test_starts_over_if_preempted_during_setup(cloud):
  cloud.plan(tpu_vm__scp=[{'preempt': True}])
  supervise(cloud)
  assert changes(cloud) == ['create', 'scp', 'delete', 'create', 'scp']


@pytest.mark.slow
def test_waits_for_a_repair(cloud):
  cloud.ready()
  cloud.plan(tpu_vm__describe=[{'out': 'REPAIRING'}, {'out': 'REPAIRING'}])
  err = supervise(cloud)
  assert err.count('pod is REPAIRING.') == 2
  assert changes(cloud) == ['scp']


def test_gives_up_after_too_many_failures_in_a_row(cloud):
  cloud.ready()
  denied = {'err': 'PERMISSION_DENIED: no'}
  cloud.plan(tpu_vm__describe=[denied] * 9)
  err = supervise(cloud, code=1, RETRIES='3')
  assert '3 steps failed in a row.' in err
  assert err.count('PERMISSION_DENIED') == 3
  assert cloud.verbs == []


@pytest.mark.slow
def test_success_resets_the_count_of_failures(cloud):
  cloud.program({'code': 75}, {'code': 75}, {})
  cloud.ready()
  # A step that resumes asks for the state twice.
  cloud.plan(tpu_vm__describe=[{'err': 'UNAVAILABLE: no'}, None, None] * 2)
  err = supervise(cloud, RETRIES='2')
  assert err.count('That failed (1 of 2)') == 2
  assert 'Training is done.' in err


def test_delay_between_retries_increases(cloud):
  record = cloud.fake / 'slept'
  conftest.write_scripts(cloud.bin, {'sleep': f'echo "$1" >>{record}'})
  cloud.plan(tpu_vm__describe=[{'err': 'UNAVAILABLE: no'}] * 9)
  slow = {'RETRY_SECONDS': '10', 'MAX_RETRY_SECONDS': '30'}
  supervise(cloud, code=1, **slow)
  assert record.read_text().split() == ['10', '20', '30', '30']


@pytest.mark.slow
def test_tpu_with_unreachable_workers_is_not_deleted(cloud):
  cloud.ready()
  cloud('train')
  cloud.clear_calls()
  cloud.plan(tpu_vm__ssh=[{'err': 'timed out', 'code': 255}] * 9)
  err = supervise(cloud, code=1, RETRIES='3')
  assert '3 steps failed in a row.' in err
  assert changes(cloud) == []


@pytest.mark.slow
def test_hanging_call_is_retried(cloud):
  cloud.ready()
  cloud('train')
  cloud.plan(tpu_vm__ssh=[{'hang': True}])
  err = supervise(cloud, CALL_TIMEOUT='2')
  assert 'No answer within 2 s: gcloud compute tpus tpu-vm ssh' in err
  assert 'Training is done.' in err
