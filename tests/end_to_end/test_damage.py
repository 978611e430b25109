"""Damage to each file of a workdir, and what the next start makes of it.

If `DAMAGE_TABLE` names a file, a row of a Markdown table is added to it for
each file and damage.
"""

import os
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from nfnet_jax.training import checkpoint
from tests.end_to_end import linear, process_groups

pytestmark = pytest.mark.full

LAST = 5  # The step of the newest checkpoint; the one before it is of step 3.


def empty(path):
  path.write_bytes(b'')


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


DAMAGES = {
  'missing': pathlib.Path.unlink,
  'empty': empty,
  'cut in half': truncate,
  'a flipped bit': flip_a_bit,
}


def result_of(workdir):
  """Return the rows of the metrics and the final state."""
  folder = workdir / 'checkpoints'
  with checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
    state = checkpoints.restore(
      linear.TOTAL, linear.Experiment().abstract_state()
    )
  return process_groups.rows_of(workdir), jax.tree.leaves(state)


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
  """A run that was stopped after step 5."""
  workdir = tmp_path_factory.mktemp('stopped') / 'run'
  process = process_groups.Process(
    linear.__name__, f'--workdir={workdir}', '--fail=0:7'
  )
  assert process.finish() == 2, process.output
  assert process_groups.checkpoints_of(workdir) == [3, LAST]
  return workdir


@pytest.fixture(scope='module')
def whole(stopped, tmp_path_factory):
  """The results of that run if nothing is damaged."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  shutil.copytree(stopped, workdir)
  process = process_groups.Process(linear.__name__, f'--workdir={workdir}')
  assert process.finish() == 0, process.output
  return result_of(workdir)


def files_of(workdir):
  """Return kind of file -> relative path of the files of this kind."""
  kinds = {}
  for path in sorted(workdir.rglob('*')):
    name = str(path.relative_to(workdir))
    if path.is_file() and not name.startswith('checkpoints/3/'):
      kind = re.sub(r'/[0-9a-f]{32}$', '/CHUNK', name)
      kind = re.sub(r'events.*', 'events', kind)
      kinds.setdefault(kind, []).append(name)
  return kinds


def start_again(run_command, workdir, whole):
  """Start the run again; return what happened."""
  code, _, err = run_command(linear.main, f'--workdir={workdir}')
  return outcome(code, err, workdir, whole)


def outcome(code, err, workdir, whole):
  """Check what a start has left, and return what happened."""
  # Threads of Orbax may print at the same time.
  lines = re.findall(r'^ *nfnet_jax: (.*)', err, re.M)
  if code:
    assert len(lines) == 1, err
    # Nothing that was there is lost.
    assert process_groups.checkpoints_of(workdir) == [3, LAST]
    return f'exit code {code}: {lines[0]}'
  resumed = re.search(r'Resuming after step (\d+)', err)
  rows, state = result_of(workdir)
  for leaf, expected in zip(state, whole[1], strict=True):
    np.testing.assert_array_equal(leaf, expected)
  text = f'resumes from step {resumed[1]}'
  if resumed[1] != str(LAST):
    assert (workdir / 'checkpoints' / f'{LAST}.unreadable').exists()
  after = [row for row in whole[0] if row['step'] > int(resumed[1])]
  assert rows[-len(after) :] == after
  if rows != whole[0]:
    lacks = re.search(r'metrics.jsonl lacks \d+ earlier steps', err)
    assert bool(lacks) == (len(rows) < len(whole[0]))
    text += f', and logs "{lacks[0]}"' if lacks else ', with a changed value'
  return text


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_file(run_command, stopped, whole, tmp_path, damage):
  for kind, names in files_of(stopped).items():
    outcomes = set()
    for index, name in enumerate(names):
      workdir = tmp_path / f'{len(kind)}-{index}' / 'run'
      shutil.copytree(stopped, workdir)
      DAMAGES[damage](workdir / name)
      outcomes.add(start_again(run_command, workdir, whole))
      shutil.rmtree(workdir)
    outcomes = {re.sub(r'/\S*/run\b', 'WORKDIR', text) for text in outcomes}
    if kind.startswith('checkpoints/'):
      assert all(text.startswith('resumes from step') for text in outcomes)
      assert 'metrics' not in ' '.join(outcomes)
    report(kind, damage, '; '.join(sorted(outcomes)))


def report(kind, damage, text):
  """Add a row to the table."""
  if 'DAMAGE_TABLE' in os.environ:
    with open(os.environ['DAMAGE_TABLE'], 'a') as table:
      table.write(f'| {kind} | {damage} | {text} |\n')


def test_file_that_may_not_be_read(stopped, whole, tmp_path):
  """Such as one of another user: no checkpoint is passed over for that."""
  for kind, (name, *_) in files_of(stopped).items():
    workdir = tmp_path / 'run'
    shutil.copytree(stopped, workdir)
    (workdir / name).chmod(0)
    process = process_groups.Process(
      linear.__name__, f'--workdir={workdir}', as_root=False
    )
    code = process.finish()
    (workdir / name).chmod(0o600)
    text = outcome(code, process.output, workdir, whole)
    text = re.sub(r'/\S*/run\b', 'WORKDIR', text)
    assert f'resumes from step {LAST}' in text or name in text, text
    assert len(text) < 800
    shutil.rmtree(workdir)
    report(kind, 'may not be read', text)
