"""A fake `gcloud` with one TPU, whose workers are folders.

The folder $FAKE holds its state:

- `calls.jsonl`: one row per call;
- `cloud.json`: the states of the TPU and of its queued request;
- `plan.json`: what the next calls of a verb do instead of succeeding: print
  `out`, report `err`, exit with `code`, `hang`, or `preempt` the TPU first;
- `w-*`: the home folders of its workers;
- `checkpoints/`: those in the run's bucket.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

FAKE = pathlib.Path(os.environ.get('FAKE', '.'))


def read(name, default):
  path = FAKE / name
  return json.loads(path.read_text()) if path.exists() else default


def homes():
  return sorted(path for path in FAKE.glob('w-*') if path.is_dir())


def end_workers():
  """End the workers' processes and delete their folders."""
  for home in homes():
    pid = home / 'nfnet_jax' / 'run' / 'pid'
    if pid.exists():
      end_group(int(pid.read_text()))
    shutil.rmtree(home)


def end_group(pid):
  with contextlib.suppress(ProcessLookupError):
    os.killpg(pid, signal.SIGKILL)


def preempt(cloud):
  end_workers()
  cloud['tpu-vm'] = 'PREEMPTED'
  if 'queued-resources' in cloud:
    cloud['queued-resources'] = 'SUSPENDED'


def create(kind, cloud, flags):
  if kind in cloud:
    return report_error('ALREADY_EXISTS: Resource already exists')
  if kind == 'queued-resources':
    cloud[kind] = 'ACTIVE'
  cloud['tpu-vm'] = 'READY'
  for number in range(int(os.environ.get('FAKE_WORKERS', 2))):
    (FAKE / f'w-{number}').mkdir()
  return 0


def delete(kind, cloud, flags):
  if kind not in cloud:
    return report_error('NOT_FOUND: Resource was not found')
  if kind == 'queued-resources' and '--force' not in flags:
    return report_error('FAILED_PRECONDITION: the request has nodes')
  end_workers()
  cloud.clear()
  return 0


def describe(kind, cloud, flags):
  if kind not in cloud:
    return report_error(f'NOT_FOUND: Resource of {kind} was not found')
  print('the/name' if flags['--format'] == 'value(name)' else cloud[kind])
  return 0


def ssh(kind, cloud, flags):
  if cloud.get('tpu-vm') != 'READY':
    return report_error('the TPU is not ready', 255)
  assert flags['--worker'] == 'all'
  runs = [
    subprocess.Popen(
      ['bash', '-c', flags['--command']],
      cwd=home,
      env=os.environ
      | {
        'HOME': str(home),
        'FAKE_WORKER': home.name,
        'PATH': f'{FAKE}/worker_bin:/usr/bin:/bin',
      },
    )
    for home in homes()
  ]
  return next((run.returncode for run in runs if run.wait()), 0)


def scp(kind, cloud, flags):
  for home in homes():
    shutil.copy(flags['words'][0], home)
  return 0


def report_error(message, code=1):
  print(f'ERROR: (gcloud) {message}', file=sys.stderr)
  return code


def storage(verb, url):
  if verb == 'ls':
    pattern = url.removeprefix('gs://bucket/runs/f3/')
    found = sorted(FAKE.glob(pattern))
    for path in found:
      print(f'gs://bucket/runs/f3/{path.relative_to(FAKE)}')
    return 0 if found else report_error('One or more URLs matched no objects.')
  return 0


def main(words):
  with (FAKE / 'calls.jsonl').open('a') as calls:
    print(json.dumps(words), file=calls)
  kind, verb = words[:2] if words[0] == 'storage' else words[2:4]
  plan, cloud = read('plan.json', {}), read('cloud.json', {})
  planned = {}
  if plan.get(f'{kind} {verb}'):
    planned = plan[f'{kind} {verb}'].pop(0) or {}
    (FAKE / 'plan.json').write_text(json.dumps(plan))
  if planned.get('hang'):
    time.sleep(60)
  if 'err' in planned:
    return report_error(planned['err'], planned.get('code', 1))
  if 'out' in planned:
    print(planned['out'])
    return 0
  if planned.get('preempt'):
    preempt(cloud)
  if kind == 'storage':
    return storage(verb, words[-1])
  flags = dict(
    word.partition('=')[::2] for word in words[4:] if word.startswith('--')
  )
  flags['words'] = [word for word in words[4:] if not word.startswith('--')]
  code = globals()[verb](kind, cloud, flags)
  (FAKE / 'cloud.json').write_text(json.dumps(cloud))
  return code


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
