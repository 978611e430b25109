"""A fake cloud and a repository for the tests of `launch/`."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.launch import fake_gcloud

ROOT = pathlib.Path(__file__).parents[2]
HERE = pathlib.Path(__file__).parent
SETTINGS = {
  'PROJECT_ID': 'project',
  'ZONE': 'zone-a',
  'TPU_NAME': 'pod',
  'WORKDIR': 'gs://bucket/runs/f3',
  'POLL_SECONDS': '0.05',
  'RETRY_SECONDS': '0',
  'RETRIES': '5',
  'CALL_TIMEOUT': '20',
}
# Flags that wrong quoting would break.
FLAGS_WITH_QUOTES = [
  "--config.data.train_split='train[10000:]'",
  '--config.train_for=90 epochs',
  '--config.note=a "b" $HOME `c` \\ * ; & é',
]
WORKER_BIN = {
  'hostname': 'echo "t1v-n-0123-$FAKE_WORKER"',
  # Installs a uv whose environments hold the fake program.
  'python3': 'echo "python3 $*" >>~/commands; mkdir -p ~/.local/bin\n'
  'cp "$FAKE/worker_bin/uv" ~/.local/bin/uv',
  'uv': 'echo "uv $*" >>~/commands; [ "$1" != venv ] ||\n'
  '{ mkdir -p venv/bin; cp "$FAKE/worker_bin/program" venv/bin/python; }',
  'program': f'exec {sys.executable} -IS {HERE}/fake_program.py "${{@:2}}"',
  'sudo': 'echo "sudo $*" >>~/commands',
  'gcsfuse': 'echo "gcsfuse $*" >>~/commands',
  'mountpoint': 'exit 1',
}


class Cloud:
  """Runs scripts of `launch/` with the fake `gcloud` and records its calls."""

  def __init__(self, folder):
    self.fake, self.repo = folder / 'fake', folder / 'repo'
    self.bin = folder / 'bin'
    self.fake.mkdir()
    gcloud = f'exec {sys.executable} -IS {HERE}/fake_gcloud.py "$@"'
    write_scripts(self.bin, {'gcloud': gcloud})
    for name in 'bash', 'dirname':  # All that settings.sh needs.
      (folder / 'bare_bin').mkdir(exist_ok=True)
      (folder / 'bare_bin' / name).symlink_to(shutil.which(name))
    write_scripts(self.fake / 'worker_bin', WORKER_BIN)
    self.program({})
    shutil.copytree(ROOT / 'launch', self.repo / 'launch')
    shutil.copy(ROOT / 'constraints.txt', self.repo)
    self.git('init', '--quiet')
    self.commit()

  def git(self, *words):
    who = ['-c', 'user.name=a', '-c', 'user.email=b']
    command = ['git', *who, *words]
    return subprocess.check_output(command, cwd=self.repo, text=True).strip()

  def commit(self):
    self.git('add', '--all')
    self.git('commit', '--quiet', '--message=a')

  def start(self, script, *words, **settings):
    path = f'{self.bin}:/usr/bin:/bin'
    # Tests that run in the background ignore SIGINT, and so do their children.
    reset = '/usr/bin/env', '--default-signal=INT'
    return subprocess.Popen(
      [*reset, self.repo / 'launch' / f'{script}.sh', *words],
      env={'PATH': path, 'HOME': str(self.fake), 'FAKE': str(self.fake)}
      | SETTINGS
      | settings,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,  # A test can interrupt it as Ctrl-C does.
    )

  def __call__(self, script, *words, code=0, **settings):
    """Run a script, check its exit code, and return its output."""
    run = self.start(script, *words, **settings)
    out, err = run.communicate(timeout=60)
    assert run.returncode == code, err
    return out, err

  def python(self, code=0, imports=True):
    """Make a local Python, which records its arguments, and return its path.

    Args:
      code: exit code of the check.
      imports: whether `nfnet_jax` can be imported.
    """
    text = (
      f'if [ "$1" = -c ]; then exit {int(not imports)}; fi\n'
      f'printf "%s\\n" "$@" >>{self.fake}/python\nexit {code}'
    )
    write_scripts(self.bin, {'python': text})
    return str(self.bin / 'python')

  def checked(self):
    """Return the words with which the local Python ran."""
    path = self.fake / 'python'
    return path.read_text().splitlines() if path.exists() else []

  def ready(self, **settings):
    """Create a TPU and set it up."""
    self('create', **settings)
    self('setup', **settings)
    self.clear_calls()

  def plan(self, **verbs):
    verbs = {
      verb.replace('__', ' ').replace('_', '-'): replies
      for verb, replies in verbs.items()
    }
    (self.fake / 'plan.new').write_text(json.dumps(verbs))
    (self.fake / 'plan.new').rename(self.fake / 'plan.json')

  def program(self, *attempts):
    (self.fake / 'program.json').write_text(json.dumps(attempts))

  def rows(self, name):
    path = self.fake / name
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]

  @property
  def calls(self):
    return self.rows('calls.jsonl')

  @property
  def verbs(self):
    """The verbs of all calls that change something: create, scp, ssh, ..."""
    verbs = [c[1] if c[0] == 'storage' else c[3] for c in self.calls]
    return [verb for verb in verbs if verb not in ('describe', 'ls')]

  def clear_calls(self):
    (self.fake / 'calls.jsonl').unlink(missing_ok=True)

  def runs(self, worker='w-0'):
    return self.rows(f'runs-{worker}.jsonl')

  def commands(self, worker='w-0'):
    return (self.fake / worker / 'commands').read_text().splitlines()


def write_scripts(folder, scripts):
  folder.mkdir(exist_ok=True)
  for name, text in scripts.items():
    (folder / name).write_text(f'#!/bin/bash\n{text}\n')
    (folder / name).chmod(0o755)


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  """A `Cloud` without a TPU."""
  cloud = Cloud(tmp_path)
  yield cloud
  monkeypatch.setattr(fake_gcloud, 'FAKE', cloud.fake)
  fake_gcloud.end_workers()
  assert not os.path.exists(cloud.fake / 'w-0')
