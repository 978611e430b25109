"""The scripts of `launch/` with a `gcloud` that can fail or hang."""

import time

import pytest

from tests.launch.conftest import FLAGS_WITH_QUOTES

QUEUED = {'PROVISIONING': 'queued_spot'}


def flags(call):
  return set(filter(lambda word: word.startswith('--'), call))


def wait_for(condition):
  deadline = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)


@pytest.mark.parametrize(
  ('provisioning', 'kind', 'extra'),
  [
    ('on_demand', 'tpu-vm', {'--version=tpu-ubuntu2204-base'}),
    ('spot', 'tpu-vm', {'--version=tpu-ubuntu2204-base', '--spot'}),
    ('queued', 'queued-resources', None),
    ('queued_spot', 'queued-resources', {'--spot'}),
  ],
)
def test_create(cloud, provisioning, kind, extra):
  cloud('create', PROVISIONING=provisioning, CREATE_FLAGS='--network=mine -q')
  call = cloud.calls[0]
  assert call[:5] == ['compute', 'tpus', kind, 'create', 'pod']
  if kind == 'queued-resources':
    extra = (extra or set()) | {
      '--async',
      '--node-id=pod',
      '--runtime-version=tpu-ubuntu2204-base',
      '--valid-until-duration=24h',
    }
  assert flags(call) == extra | {
    '--accelerator-type=v3-128',
    '--network=mine',
    '--project=project',
    '--zone=zone-a',
    '--quiet',
  }


@pytest.mark.parametrize(
  ('accelerator', 'runtime'),
  [
    ('v2-8', 'tpu-ubuntu2204-base'),
    ('v4-64', 'tpu-ubuntu2204-base'),
    ('v5litepod-16', 'v2-alpha-tpuv5-lite'),
    ('v5p-8', 'v2-alpha-tpuv5'),
    ('v6e-64', 'v2-alpha-tpuv6e'),
  ],
)
def test_runtime_depends_on_the_generation(cloud, accelerator, runtime):
  flags = {'ACCELERATOR_TYPE': accelerator}
  out, _ = cloud('create', '--dry_run', **flags)
  assert f' --version={runtime} ' in out
  out, _ = cloud('create', '--dry_run', RUNTIME_VERSION='mine', **flags)
  assert ' --version=mine ' in out


def test_failed_create_reports_gclouds_message(cloud):
  cloud.plan(tpu_vm__create=[{'err': 'no capacity in zone-a', 'code': 3}])
  _, err = cloud('create', code=3)
  assert 'ERROR: (gcloud) no capacity in zone-a' in err
  assert cloud.verbs == ['create']
  assert 'is ready' not in err


def test_hanging_call_times_out(cloud):
  cloud.plan(tpu_vm__create=[{'hang': True}])
  begin = time.monotonic()
  _, err = cloud('create', code=124, CREATE_TIMEOUT='1')
  assert time.monotonic() - begin < 10
  assert 'No answer within 1 s: gcloud compute tpus tpu-vm create' in err


def test_create_waits_in_the_queue(cloud):
  waiting = [{'out': 'WAITING_FOR_RESOURCES'}, {'out': 'PROVISIONING'}]
  listed_late = {'err': 'NOT_FOUND: not yet'}
  cloud.plan(
    queued_resources__describe=[listed_late, *waiting],
    tpu_vm__describe=[{'out': 'CREATING'}],
  )
  _, err = cloud('create', **QUEUED)
  states = [line.split()[-1] for line in err.splitlines()]
  assert states[1:-1] == [
    'ABSENT.',
    'WAITING_FOR_RESOURCES.',
    'PROVISIONING.',
    'CREATING.',
    'ready.',
  ]


@pytest.mark.parametrize(
  'state',
  [
    'FAILED',
    *(
      pytest.param(s, marks=pytest.mark.slow)
      for s in ('SUSPENDED', 'SUSPENDING')
    ),
  ],
)
def test_create_fails_if_its_request_fails(cloud, state):
  cloud.plan(queued_resources__describe=[{'out': state}])
  _, err = cloud('create', code=1, **QUEUED)
  assert f'pod is {state}.' in err


@pytest.mark.slow
def test_waiting_has_a_timeout(cloud):
  cloud.plan(tpu_vm__describe=[{'out': 'CREATING'}] * 1000)
  _, err = cloud('create', code=1, READY_TIMEOUT='1')
  assert 'pod is still CREATING after 1 s.' in err
  cloud.plan(tpu_vm__describe=[{'err': 'NOT_FOUND: no'}] * 1000)
  _, err = cloud('resume', code=1, CALL_TIMEOUT='1')
  assert 'There is no pod.' in err


def test_create_fails_if_the_state_is_unknown(cloud):
  cloud.plan(tpu_vm__describe=[{'err': 'PERMISSION_DENIED: no'}])
  _, err = cloud('create', code=1)
  assert 'PERMISSION_DENIED' in err
  assert 'is ready' not in err


def test_setup_installs_the_same_commit_and_packages_on_every_worker(cloud):
  (cloud.repo / 'committed.py').write_text('a')
  cloud.commit()
  (cloud.repo / 'uncommitted.py').write_text('b')
  cloud('create')
  _, err = cloud('setup', PYTHON_VERSION='3.11', UV_VERSION='1.2.3')
  assert 'Uncommitted changes are not copied.' in err
  for worker in 'w-0', 'w-1':
    source = cloud.fake / worker / 'nfnet_jax' / 'source'
    assert (source / 'committed.py').exists()
    assert (source / 'constraints.txt').exists()
    assert not (source / 'uncommitted.py').exists()
    assert cloud.commands(worker) == [
      'python3 -m pip install --quiet --user uv==1.2.3',
      'uv venv --quiet --clear --python 3.11 venv',
      'uv pip install --quiet --python venv/bin/python '
      '--constraint source/constraints.txt ./source[train,tpu]',
    ]


def test_edited_settings_cause_no_warning(cloud):
  cloud('create')
  path = cloud.repo / 'launch' / 'settings.sh'
  path.write_text(path.read_text() + ': "${MINE:=1}"\n')
  assert 'Uncommitted' not in cloud('setup')[1]


@pytest.mark.slow
def test_second_setup_installs_another_commit(cloud):
  (cloud.repo / 'old.py').write_text('a')
  cloud.commit()
  cloud.ready()
  cloud.git('mv', 'old.py', 'new.py')
  cloud.commit()
  source = cloud.fake / 'w-1' / 'nfnet_jax' / 'source'
  cloud('setup')
  assert [p.name for p in source.glob('*.py')] == ['new.py']
  cloud('setup', COMMIT='HEAD~1')
  assert [p.name for p in source.glob('*.py')] == ['old.py']


@pytest.mark.parametrize(
  'before',
  [['create'], pytest.param(['create', 'setup'], marks=pytest.mark.slow)],
)
def test_setup_fails_if_one_worker_fails(cloud, before):
  for script in before:
    cloud(script)
  uv = cloud.fake / 'worker_bin' / 'uv'
  uv.write_text('#!/bin/bash\n[ $FAKE_WORKER = w-0 ] || [ $1 != pip ]\n')
  _, err = cloud('setup', code=1)
  assert 'Every worker is set up' not in err
  _, err = cloud('train', code=1)
  assert 'pod is not set up. Run launch/setup.sh.' in err


def test_train_runs_the_command_on_every_worker_with_the_same_flags(cloud):
  cloud.ready()
  cloud(
    'train', '--config=f3', *FLAGS_WITH_QUOTES, DATA_DIR='gs://bucket/datasets'
  )
  wait_for(lambda: cloud.runs('w-0') and cloud.runs('w-1'))
  for worker in 'w-0', 'w-1':
    (run,) = cloud.runs(worker)
    assert run['words'] == [
      'nfnet_jax.experiments.train',
      '--config=f3',
      *FLAGS_WITH_QUOTES,
      '--workdir=gs://bucket/runs/f3',
      '--require_platform=tpu',
      '--config.run.data_dir=gs://bucket/datasets',
    ]
    assert run['cwd'] == str(cloud.fake / worker / 'nfnet_jax' / 'source')


def test_train_reads_from_the_mount_point(cloud):
  cloud.ready()
  cloud('train', DATA_DIR='gs://bucket/datasets', MOUNT_POINT='/mnt/data')
  assert '--config.run.data_dir=/mnt/data' in cloud.calls[-1][6]


def test_train_refuses_to_start_twice(cloud):
  cloud.program({'seconds': 60})
  cloud.ready()
  cloud('train')
  cloud.clear_calls()
  _, err = cloud('train', code=1)
  assert 'w-0 running\n' in err
  assert 'w-1 running\n' in err
  assert 'pod is already training' in err
  assert len(cloud.calls) == 1
  _, err = cloud('setup', code=1)
  assert 'w-0 is training. launch/stop.sh stops it.' in err
  assert [len(cloud.runs(worker)) for worker in ('w-0', 'w-1')] == [1, 1]


@pytest.mark.slow
def test_worker_refuses_to_start_twice(cloud):
  cloud.program({'seconds': 60})
  cloud.ready()
  # The workers report idle, as when two users start at the same time.
  answer = {'out': 'w-0 idle\nw-1 idle'}
  cloud('train')
  cloud.plan(tpu_vm__ssh=[answer])
  _, err = cloud('train', code=1)
  assert 'w-1 is already training.' in err
  assert len(cloud.runs()) == 1


def test_train_reports_a_missing_tpu_or_setup(cloud):
  _, err = cloud('train', code=255)
  assert 'the TPU is not ready' in err
  cloud('create')
  _, err = cloud('train', code=1)
  assert 'pod is not set up. Run launch/setup.sh.' in err
  cloud.plan(tpu_vm__ssh=[{'out': 'Welcome to your worker'}])
  _, err = cloud('train', code=1)
  assert 'No worker of pod answered.' in err


@pytest.mark.slow
def test_watch_shows_every_worker_until_the_end(cloud):
  cloud.program({'seconds': 1, 'code': 1})
  cloud.ready()
  cloud('train')
  out, _ = cloud('watch')
  lines = out.splitlines()
  for worker in 'w-0', 'w-1':
    assert f'{worker} attempt 1' in lines
    assert f'{worker} 1' in lines


def test_watch_ends_if_no_worker_has_trained(cloud):
  cloud.ready()
  assert sorted(cloud('watch')[0].splitlines()) == ['w-0 idle', 'w-1 idle']


def test_stop_makes_training_save_and_train_resumes(cloud):
  cloud.program({'seconds': 60}, {'seconds': 60})
  cloud.ready()
  cloud('train', '--config=f3')
  wait_for(lambda: cloud.runs('w-0') and cloud.runs('w-1'))
  assert sorted(cloud('stop')[0].splitlines()) == ['w-0 75', 'w-1 75']
  cloud('train', '--config=f3')
  wait_for(lambda: len(cloud.runs()) == 2)
  first, second = cloud.runs()
  assert first == second


@pytest.mark.slow
def test_stop_kills_a_run_that_does_not_save(cloud):
  (cloud.fake / 'worker_bin' / 'program').write_text(
    "#!/bin/bash\ntrap '' TERM\ntouch $FAKE/$FAKE_WORKER/up\n"
    'for i in {1..600}; do sleep 0.1; done\n'
  )
  cloud.ready()
  cloud('train')
  wait_for(lambda: len(list(cloud.fake.glob('w-*/up'))) == 2)
  cloud('stop', STOP_TIMEOUT='1')
  assert {'w-0 137', 'w-1 137'} <= set(cloud('watch')[0].splitlines())


@pytest.mark.slow
def test_resume_sets_up_a_new_tpu_and_trains(cloud):
  cloud('create')
  cloud.clear_calls()
  data = {'DATA_DIR': 'gs://bucket/data/sets', 'MOUNT_POINT': '/mnt/data'}
  cloud('resume', '--config=f3', *FLAGS_WITH_QUOTES, **data)
  assert cloud.verbs == ['scp', 'ssh', 'ssh', 'ssh', 'ssh']
  wait_for(lambda: cloud.runs('w-1'))
  assert cloud.runs('w-1')[0]['words'][1 : 2 + len(FLAGS_WITH_QUOTES)] == [
    '--config=f3',
    *FLAGS_WITH_QUOTES,
  ]
  mounted = (
    'gcsfuse --implicit-dirs --only-dir data/sets -o ro bucket /mnt/data'
  )
  assert cloud.commands()[-1] == mounted


def test_prepare_runs_locally_and_copies_to_the_bucket(cloud):
  record = cloud.fake / 'record'
  python = cloud.bin / 'my_python'
  python.write_text(f'#!/bin/bash\necho "$@" >{record}\nexit ${{CODE:-0}}\n')
  python.chmod(0o755)
  here = {'DATA_DIR': 'gs://b/data', 'PYTHON': str(python), 'DATASETS': 'sets'}
  words = ['prepare', 'imagenet2012:5.1.0', '--manual_dir=my tars']
  cloud('data', *words, code=2, CODE='2', **here)
  assert cloud.calls == []
  cloud('data', *words, **here)
  assert record.read_text().split(maxsplit=1) == [
    '-m',
    'nfnet_jax.experiments.prepare imagenet2012:5.1.0 --manual_dir=my tars '
    '--data_dir=sets\n',
  ]
  source, target = 'sets/imagenet2012', 'gs://b/data/imagenet2012'
  (call,) = cloud.calls
  assert call == ['storage', 'rsync', '--recursive', source, target]


def test_delete_names_what_it_deletes(cloud):
  cloud('create')
  _, err = cloud('delete')
  assert 'Deleting tpu-vm pod in zone-a of project.' in err
  assert cloud.calls[-1][2:5] == ['tpu-vm', 'delete', 'pod']
  assert '--quiet' in cloud.calls[-1]
  assert not (cloud.fake / 'w-0').exists()


def test_delete_also_deletes_the_request(cloud):
  cloud('create', **QUEUED)
  _, err = cloud('delete', **QUEUED)
  assert 'Deleting queued-resources pod' in err
  assert '--force' in cloud.calls[-1]


@pytest.mark.parametrize('settings', [{}, QUEUED])
def test_deleting_an_absent_tpu_succeeds(cloud, settings):
  _, err = cloud('delete', **settings)
  assert 'There is no pod in zone-a of project; nothing to delete.' in err
  assert cloud.verbs == []


def test_delete_needs_to_know_whether_there_is_a_tpu(cloud):
  cloud('create')
  cloud.plan(tpu_vm__describe=[{'err': 'PERMISSION_DENIED: no', 'code': 4}])
  cloud('delete', code=4)
  assert 'delete' not in cloud.verbs
