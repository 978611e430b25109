"""The commands of `launch/README.md`, and the Dockerfile that it builds."""

import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests import pages
from tests.launch import conftest

LAUNCH = pages.ROOT / 'launch'
README = LAUNCH / 'README.md'
BLOCKS = pages.blocks(README, 'sh')


def block(part):
  (code,) = [code for code in BLOCKS if part in code]
  return code


def run(cloud, code, **variables):
  result = subprocess.run(
    ['bash', '-euc', code],
    env={'PATH': f'{cloud.bin}:/usr/bin:/bin', **variables},
    cwd=cloud.repo,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  return result.stdout


def record_tools(cloud):
  """Replace the tools by ones that print their arguments, and `gcloud` too."""
  tools = {
    tool: f'echo {tool} "$@" >>{cloud.fake}/tools'
    for tool in ('docker', 'kubectl')
  }
  tools['gcloud'] = (
    f'echo gcloud "$@" >>{cloud.fake}/tools\n'
    '[ "$1 $2" != "projects describe" ] || echo 123'
  )
  conftest.write_scripts(cloud.bin, tools)


def recorded(cloud):
  return (cloud.fake / 'tools').read_text().splitlines()


def test_every_block_is_run():
  """By one of the tests below."""
  parts = (
    'gcloud storage buckets create',
    'launch/create.sh',
    'pip install',
    'launch/check.sh',
    'launch/supervise.sh',
    'docker build',
    '--coordinator',
  )
  assert sorted(map(block, parts)) == sorted(BLOCKS)


def test_steps_once_per_project(cloud):
  record_tools(cloud)
  run(cloud, block('gcloud storage buckets create'))
  calls = recorded(cloud)
  assert len(calls) == 7
  assert 'services enable tpu.googleapis.com' in calls[0]
  assert '--location=europe-west4 ' in calls[1]
  member = '123-compute@developer.gserviceaccount.com'
  bindings = [call for call in calls if 'add-iam-policy-binding' in call]
  assert bindings == [
    'gcloud storage buckets add-iam-policy-binding gs://my-bucket '
    f'--member=serviceAccount:{member} --role=roles/storage.{role}'
    for role in ('legacyBucketReader', 'objectAdmin')
  ]
  assert '--zone=europe-west4-a' in calls[-2]


@pytest.mark.parametrize(
  ('part', 'kind'),
  [
    ('launch/create.sh', 'tpu-vm'),
    ('launch/supervise.sh', 'queued-resources'),
  ],
)
def test_scripts_run(cloud, part, kind):
  out = run(cloud, block(part), DRY_RUN='1')
  assert 'nfnet_jax.experiments.check --config=f3' in out
  assert f'{kind} create f3' in out
  assert f'{kind} delete f3' in out
  assert '--accelerator-type=v3-128' in out
  assert cloud.calls == []


def test_check_runs(cloud):
  (line,) = run(cloud, block('launch/check.sh'), DRY_RUN='1').splitlines()
  assert line == (
    '.venv/bin/python -m nfnet_jax.experiments.check --config=f3 '
    '--accelerator_type=v3-128 --price_per_chip_hour=1.2'
  )


def test_package_is_installed_as_in_the_guide():
  """CI installs the package likewise, also with the extra `train`."""
  venv, install = block('pip install').splitlines()
  assert venv == 'python3 -m venv .venv'
  guide = pages.block('plan.md', 'sh', 'pip install')
  assert install.replace('[train,plan]', '[plan]') in guide


def test_image_is_built_and_the_job_started(cloud):
  record_tools(cloud)
  run(cloud, block('docker build'))
  calls = recorded(cloud)
  image = 'europe-west4-docker.pkg.dev/my-project/nfnet/nfnet_jax'
  job = (LAUNCH / 'kubernetes.yaml').read_text()
  assert image.replace('my-project', 'PROJECT') in job
  (build,) = [call for call in calls if call.startswith('docker build')]
  assert build.endswith(f'--file=launch/Dockerfile --tag={image} .')
  assert f'docker push {image}' in calls
  files = set(re.findall(r'--file(?:name)?=(\S+)', '\n'.join(calls)))
  assert all((pages.ROOT / path).is_file() for path in files)
  assert f'jobset-name={re.search(r"name: (.*)", job)[1]}' in ' '.join(calls)


def test_command_of_several_hosts_parses():
  """`tests/test_doc_commands.py` runs that of `docs/pods.md`."""
  here, guide = (
    {word.partition('=')[0] for word in shlex.split(text, comments=True)}
    for text in (
      block('--coordinator'),
      pages.block('pods.md', 'sh', '--coordinator'),
    )
  )
  assert here - {'python', '\n'} <= guide


def instructions():
  """Return the instructions of the Dockerfile: name, then words."""
  lines = (LAUNCH / 'Dockerfile').read_text().splitlines()
  return [shlex.split(line) for line in lines if not line.startswith('#')]


def test_image_has_the_python_of_the_workers():
  settings = (LAUNCH / 'settings.sh').read_text()
  version = re.search(r'PYTHON_VERSION:=(.*)}', settings)[1]
  assert instructions()[0] == ['FROM', f'python:{version}-slim']


def test_image_holds_what_installing_needs(tmp_path):
  for name, *words in instructions():
    if name != 'COPY':
      continue
    *sources, target = words
    for source in map(pathlib.Path, sources):
      if (pages.ROOT / source).is_dir():
        assert target == str(source)
        shutil.copytree(pages.ROOT / source, tmp_path / target)
      else:
        shutil.copy(pages.ROOT / source, tmp_path / target)
  (install,) = [words for words in instructions() if words[0] == 'RUN']
  assert (tmp_path / install[install.index('-c') + 1]).is_file()
  run = subprocess.run(
    [sys.executable, 'setup.py', '--name'],
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stderr
  assert 'nfnet_jax' in run.stdout


def test_entrypoint_is_the_command_of_the_job():
  last = (LAUNCH / 'Dockerfile').read_text().splitlines()[-1]
  words = re.findall(r'"([^"]*)"', last.removeprefix('ENTRYPOINT '))
  job = (LAUNCH / 'kubernetes.yaml').read_text()
  assert f'command: [{", ".join(words)}]' in job
