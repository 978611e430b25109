"""A fake Python of a worker, which records its command and simulates a run.

`program.json` lists what each attempt does, in order: `reach` or `begin` a
checkpoint, run for `seconds` or until SIGTERM, and exit with `code`. An entry
is for all workers, or maps each worker to an entry.
"""

import json
import os
import pathlib
import signal
import sys
import time

FAKE = pathlib.Path(os.environ.get('FAKE', '.'))


def main(words):
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
  worker = os.environ['FAKE_WORKER']
  with (FAKE / f'runs-{worker}.jsonl').open('a') as runs:
    print(json.dumps({'words': words, 'cwd': os.getcwd()}), file=runs)
  attempts = json.loads((FAKE / 'program.json').read_text())
  done = len((FAKE / f'runs-{worker}.jsonl').read_text().splitlines())
  attempt = attempts[min(done, len(attempts)) - 1]
  attempt = attempt.get(worker, attempt)
  # An incomplete checkpoint does not have commit_success.txt.
  for key, file in (('reach', 'commit_success.txt'), ('begin', 'half')):
    if key in attempt:
      checkpoint = FAKE / 'checkpoints' / str(attempt[key])
      checkpoint.mkdir(parents=True, exist_ok=True)
      (checkpoint / file).touch()
  print(f'attempt {done}', flush=True)
  time.sleep(attempt.get('seconds', 0))
  return attempt.get('code', 0)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
