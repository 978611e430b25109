"""Help, dry runs and bad settings of every script of `launch/`."""

import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.launch import conftest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = [
  'check',
  'create',
  'data',
  'delete',
  'resume',
  'setup',
  'stop',
  'supervise',
  'train',
  'watch',
]


@pytest.mark.slow
def test_shellcheck_finds_nothing():
  path = pathlib.Path(sys.executable).parent / 'shellcheck'
  shellcheck = path if path.exists() else shutil.which('shellcheck')
  scripts = sorted((ROOT / 'launch').glob('*.sh'))
  run = subprocess.run(
    [shellcheck, *scripts], capture_output=True, text=True, cwd=ROOT
  )
  assert (run.stdout, run.stderr, run.returncode) == ('', '', 0)


def test_every_script_is_covered():
  found = {path.stem for path in (ROOT / 'launch').glob('*.sh')}
  assert found == {*SCRIPTS, 'lib', 'settings', 'worker', 'slurm'}


# The words after `gcloud compute tpus` that a dry run prints.
DRY = {
  'create': ['tpu-vm create', 'tpu-vm describe'],
  'setup': ['tpu-vm scp', 'tpu-vm ssh'],
  'train': ['tpu-vm ssh', 'tpu-vm ssh'],
  'watch': ['tpu-vm ssh'],
  'stop': ['tpu-vm ssh'],
  'delete': ['tpu-vm describe', 'tpu-vm delete'],
}
DRY['resume'] = ['tpu-vm describe', *DRY['setup'], *DRY['train']]
DRY['supervise'] = [
  *('tpu-vm describe', 'tpu-vm ssh'),
  *(DRY['delete'] + DRY['create'] + DRY['resume']),
]


@pytest.mark.parametrize('script', DRY)
def test_dry_run_prints_every_command_and_calls_nothing(cloud, script):
  words = ['--config=f3'] if script in ('train', 'resume', 'supervise') else []
  out, _ = cloud(script, '--dry_run', *words)
  assert cloud.calls == []
  printed = [shlex.split(line) for line in out.splitlines()]
  if script == 'supervise':
    check = printed.pop(0)
    assert check[1:4] == ['-m', 'nfnet_jax.experiments.check', '--config=f3']
  tpus = [words for words in printed if words[0] == 'gcloud']
  assert [' '.join(words[3:5]) for words in tpus] == DRY[script]
  assert all({'--project=project', '--zone=zone-a'} <= set(w) for w in tpus)
  assert all(w[0] == 'gcloud' or 'archive' in w for w in printed)


def test_dry_run_prints_the_calls_of_a_run(cloud):
  cloud.ready()
  printed, _ = cloud('train', '--dry_run', *conftest.FLAGS_WITH_QUOTES)
  cloud('train', *conftest.FLAGS_WITH_QUOTES)
  printed = [shlex.split(line)[1:] for line in printed.splitlines()]
  assert printed == cloud.calls


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_prints_the_usage_and_calls_nothing(cloud, script):
  out, _ = cloud(script, '--help', PROJECT_ID='')
  assert f'  launch/{script}.sh [--dry_run]' in out
  assert 'source' not in out
  assert cloud.calls == []


@pytest.mark.parametrize(
  ('script', 'setting'),
  [
    *((script, 'TPU_NAME') for script in SCRIPTS),
    ('delete', 'PROJECT_ID'),
    ('delete', 'ZONE'),
  ],
)
def test_missing_setting_is_named_before_any_call(cloud, script, setting):
  _, err = cloud(script, code=2, **{setting: ''})
  assert err == (
    f'launch: Set {setting}, in launch/settings.sh or in the environment.\n'
  )
  assert cloud.calls == []


@pytest.mark.parametrize(
  ('command', 'settings', 'culprit'),
  [
    (['train'], {'WORKDIR': ''}, 'Set WORKDIR'),
    (['supervise'], {'WORKDIR': ''}, 'Set WORKDIR'),
    (['resume'], {'WORKDIR': ''}, 'Set WORKDIR'),
    (['train'], {'WORKDIR': '/tmp/run'}, "WORKDIR='/tmp/run' is no bucket"),
    (['train'], {'DATA_DIR': 'gs://'}, "DATA_DIR='gs://' is no bucket"),
    (['data', 'mount'], {}, 'Set DATA_DIR'),
    (['data', 'mount'], {'DATA_DIR': 'gs://b/d'}, 'Set MOUNT_POINT'),
    (
      ['data', 'mount'],
      {'DATA_DIR': 'gs://b', 'MOUNT_POINT': '/d'},
      "DATA_DIR='gs://b' names no folder",
    ),
    (['data'], {'DATA_DIR': 'gs://b/d'}, "Pass 'prepare DATASET' or 'mount'"),
    (['data', 'prepare'], {'DATA_DIR': 'gs://b/d'}, 'Name the dataset'),
    (['create'], {'PROVISIONING': 'free'}, "PROVISIONING='free'"),
    (['create'], {'CHECK': 'all'}, "CHECK='all' is not possible"),
    (['supervise'], {'DELETE_WHEN_DONE': 'yes'}, 'Choose one of: 0 1.'),
    (['create'], {'ACCELERATOR_TYPE': 'tpu7x-128'}, 'v2 to v6e'),
    (['delete', 'another'], {}, "Unexpected argument 'another'"),
    (['setup'], {'COMMIT': 'nowhere'}, "COMMIT='nowhere' is no commit"),
    (['supervise'], {'COMMIT': 'nowhere'}, "COMMIT='nowhere' is no commit"),
  ],
)
def test_bad_setting_is_named_before_any_call(
  cloud, command, settings, culprit
):
  _, err = cloud(*command, code=2, **settings)
  assert culprit in err
  assert len(err.splitlines()) == 1
  assert cloud.calls == []


def test_missing_gcloud_is_named(cloud):
  path = str(cloud.bin.parent / 'bare_bin')
  _, err = cloud('watch', code=2, PATH=path)
  assert err.startswith('launch: gcloud is not on PATH')
  assert len(cloud('watch', '--dry_run', PATH=path)[0].splitlines()) == 1
