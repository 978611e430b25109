"""Check that constraints.txt pins every package, and write their hashes.

  python .ci/pins.py           exits with 1 and names what is not pinned
  python .ci/pins.py --write   writes requirements-hashed.txt, for '.[train]'

Resolves all extras for Linux and macOS with uv, from the package index.
"""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
PYTHON = '3.11.5'  # The first one for which the packages of `docs` exist.
OTHERS = re.compile(r"sys_platform == '(win32|emscripten)'")
HASHED = ROOT / 'requirements-hashed.txt'


def resolve(*options: str) -> list[str]:
  """Return the lines of uv's answer."""
  command = ['uv', 'pip', 'compile', 'setup.py', '-c', 'constraints.txt']
  command += ['--universal', '--python-version', PYTHON, '--quiet']
  command += ['--no-annotate', '--no-header', *options]
  done = subprocess.run(
    command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
  )
  return done.stdout.splitlines()


def pin_of(line: str) -> tuple[str, str]:
  """Return the normalised name and the version of `NAME==VERSION ...`."""
  name, version = re.match('([^ =]+)==([^ ;]+)', line).groups()
  return re.sub('[-_.]+', '-', name).lower(), version


def main() -> None:
  """Check, or write with `--write`."""
  if '--write' in sys.argv:
    text = '\n'.join(resolve('--extra', 'train', '--generate-hashes'))
    HASHED.write_text(f'# Written by .ci/pins.py --write.\n{text}\n')
    return
  lines = (ROOT / 'constraints.txt').read_text().splitlines()
  pins = {pin_of(line) for line in lines if '==' in line}
  names = {name for name, _ in pins}
  needed = [x for x in resolve('--all-extras') if not OTHERS.search(x)]
  missing = [line for line in needed if pin_of(line)[0] not in names]
  hashed = [
    line
    for line in HASHED.read_text().splitlines()
    if '==' in line and not OTHERS.search(line)
  ]
  stale = [line for line in hashed if pin_of(line) not in pins]
  for line in missing:
    print(f'constraints.txt does not pin {line}')
  for line in stale:
    print(f'{HASHED.name} has {line}; write it again')
  sys.exit(bool(missing or stale))


if __name__ == '__main__':
  main()
