"""Checkpoints: atomic writes, damaged contents, outages, Orbax's logs."""

import contextlib
import errno
import pathlib
import signal
import subprocess
import sys

from absl import logging
from etils import epath
import jax
import numpy as np
import pytest

import nfnet_jax
from nfnet_jax.storage import failures, files
from nfnet_jax.training import checkpoint, state, unfinished
from tests.training import small_models
from tests.training.small_checkpoints import replace_last_step, small_state


@pytest.fixture(scope='module')
def saved_state():
  """A state with parameters, statistics, momentum and different EMAs."""
  fresh = state.create_state(
    small_models.normalised(),
    nfnet_jax.make_optimizer(0.1),
    seed=0,
    image_size=4,
  )
  ema_params = jax.tree.map(lambda p: p * 2, fresh.params)
  # This array fills most of the file and does not compress. The bytes that
  # `damage` flips are therefore values, and only a checksum shows the change.
  noise = np.random.default_rng(0).standard_normal(10_000, np.float32)
  return jax.device_get(
    fresh._replace(
      ema_params=ema_params,
      model_state={**fresh.model_state, 'noise': {'values': noise}},
    )
  )


def at(saved_state, step):
  return saved_state._replace(step=np.int32(step))


def assert_equal(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_round_trip_keeps_the_newest(tmp_path, saved_state):
  with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.restore_latest(saved_state) is None
    for step in (3, 6, 9):
      checkpoints.save(at(saved_state, step))
    checkpoints.save(at(saved_state, 9))  # Again: nothing happens.
    checkpoints.wait()
    assert checkpoints.steps() == [6, 9]
    restored = checkpoints.restore_latest(saved_state)
  assert_equal(restored, at(saved_state, 9))
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(restored)}
  assert dtypes == {np.dtype('float32'), np.dtype('int32')}


def test_saved_values_do_not_follow_the_buffers(tmp_path, saved_state):
  mutable = jax.tree.map(np.array, saved_state)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(mutable)
    for leaf in jax.tree.leaves(mutable.params):
      leaf[...] = 0
    checkpoints.wait()
    assert_equal(checkpoints.restore_latest(saved_state), saved_state)


def damage(directory: pathlib.Path, how: str):
  """Truncate the largest file below a directory, or flip its bits."""
  files = [path for path in directory.rglob('*') if path.is_file()]
  path = max(files, key=lambda file: file.stat().st_size)
  content = bytearray(path.read_bytes())
  if how == 'flipped':
    content[len(content) // 2] ^= 0xFF
  path.write_bytes(content if how == 'flipped' else content[:100])


@pytest.mark.parametrize('how', ['flipped', 'cut'])
def test_damaged_latest_is_reported_and_the_one_before_is_used(
  tmp_path, saved_state, caplog, how
):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    for step in (3, 6):
      checkpoints.save(at(saved_state, step))
  damage(tmp_path / '6', how)
  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    restored = checkpoints.restore_latest(saved_state)
    assert_equal(restored, at(saved_state, 3))
    assert 'Checkpoint 6 cannot be read' in caplog.text
    assert checkpoints.steps() == [3, 6]  # Reading moves nothing.
    checkpoints.save(at(saved_state, 4))
    checkpoints.wait()
    assert checkpoints.steps() == [4]
  assert (tmp_path / '6.unreadable').is_dir()


def test_nothing_readable_is_an_error(tmp_path, saved_state):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(at(saved_state, 3))
  damage(tmp_path / '3', 'cut')
  with (
    checkpoint.Checkpoints(tmp_path) as checkpoints,
    pytest.raises(checkpoint.UnreadableError, match=r'\[3\] .* new workdir'),
  ):
    checkpoints.restore_latest(saved_state)


@pytest.mark.parametrize(
  'outage',
  [
    OSError(errno.EIO, 'Input/output error'),
    ValueError('UNAVAILABLE: Error reading "state" in OCDBT database'),
  ],
)
def test_outage_is_not_reported_as_damage(
  tmp_path, saved_state, monkeypatch, outage
):
  def fail(step, template):
    tried.append(step)
    raise outage if step == 6 else ValueError('damaged')

  tried = []
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    for step in (3, 6):
      checkpoints.save(small_state(step))
    checkpoints.wait()
    monkeypatch.setattr(checkpoints, 'restore', fail)
    with pytest.raises(checkpoint.OutageError, match=r'Checkpoint 6 .* now'):
      checkpoints.restore_latest(saved_state)
    # An older one is not used in its place.
    assert tried == [6] * (1 + len(failures.DELAYS_S))
    assert checkpoints.steps() == [3, 6]


def test_failed_read_is_tried_again(tmp_path, saved_state, monkeypatch):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    for step in (3, 6):
      checkpoints.save(at(saved_state, step))
    checkpoints.wait()
    restore, outages = checkpoints.restore, [OSError(5, 'disk')]

    def flaky(step, template):
      if outages:
        raise outages.pop()
      return restore(step, template)

    monkeypatch.setattr(checkpoints, 'restore', flaky)
    assert checkpoints.restore_latest(saved_state).step == 6


def test_same_step_can_be_damaged_twice(tmp_path, saved_state):
  for _ in range(2):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
      checkpoints.restore_latest(saved_state)
      for step in (3, 6):
        checkpoints.save(at(saved_state, step))
    damage(tmp_path / '6', 'cut')
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.restore_latest(saved_state)
    checkpoints.save(at(saved_state, 6))
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {'3', '6', '6.unreadable', '6.unreadable1'}


def test_read_only_changes_nothing(tmp_path, saved_state):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(at(saved_state, 3))
  before = sorted(tmp_path.rglob('*'))
  with checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.restore_latest(saved_state).step == 3
  assert sorted(tmp_path.rglob('*')) == before


KILLED = """
import os, signal, sys
from nfnet_jax.training import checkpoint
from tests.training import small_checkpoints

checkpoints = checkpoint.Checkpoints(sys.argv[1])
last = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
small_checkpoints.replace_last_step(last)
checkpoints.save(small_checkpoints.small_state(6))
checkpoints.wait()
"""


@pytest.fixture(params=['disk', pytest.param('bucket', marks=pytest.mark.slow)])
def place(request, tmp_path):
  if request.param == 'disk':
    return epath.Path(tmp_path)
  request.getfixturevalue('buckets').objects.setdefault('checkpoints', {})
  return epath.Path('gs://checkpoints/run')


def test_incomplete_checkpoint_is_ignored_and_removed(
  place, saved_state, monkeypatch
):
  with checkpoint.Checkpoints(place) as checkpoints:
    for step in 3, 4:
      checkpoints.save(small_state(step))
  (place / '4').rename(place / '4.unreadable')
  whole = {path.name for path in place.iterdir()}
  killed = subprocess.run([sys.executable, '-c', KILLED, place], check=False)
  assert killed.returncode == -signal.SIGKILL
  left = {path.name for path in place.iterdir()}
  assert len(left - whole) == 1
  with checkpoint.Checkpoints(place, read_only=True) as reader:
    assert reader.steps() == [3]
    assert {path.name for path in place.iterdir()} == left
    with checkpoint.Checkpoints(place) as checkpoints:
      assert checkpoints.steps() == [3]
      on_disk = not files.is_in_bucket(place)
      after = {path.name for path in place.iterdir()}
      assert after == (whole if on_disk else left)
      assert reader.restore_latest(small_state(0)).step == 3
  # In a bucket it is removed later, but not a copy of a complete one.
  monkeypatch.setattr(unfinished, 'LONG_AGO_S', 0.0)
  (place / '3' / 'commit_success.txt').unlink(missing_ok=True)
  checkpoint.Checkpoints(place).close()
  assert {path.name for path in place.iterdir()} == whole


def test_full_disk_is_reported_once(tmp_path, caplog):
  def full(*_, **__):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with pytest.MonkeyPatch.context() as patch:
    replace_last_step(full, patch.setattr)
    with checkpoint.quiet_orbax():
      checkpoints = checkpoint.Checkpoints(tmp_path)
      checkpoints.save(small_state(3))
      with pytest.raises(checkpoint.SaveError, match='No space left on device'):
        checkpoints.wait()
      with contextlib.suppress(checkpoint.SaveError):
        checkpoints.close()
  assert caplog.text == ''


def test_opening_checkpoints_does_not_change_the_logger(tmp_path):
  logger = logging.get_absl_logger()
  before = list(logger.filters)
  with checkpoint.Checkpoints(tmp_path):
    assert logger.filters == before
  with checkpoint.quiet_orbax():
    assert logger.filters != before
  assert logger.filters == before
