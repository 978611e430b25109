"""Tests of the lock on a workdir; real processes hold it."""

import contextlib
import datetime
import json
import signal
import subprocess
import sys
import time

from google.api_core import exceptions
import pytest

from nfnet_jax import errors
from nfnet_jax.storage import lock

_HOLD = """
import sys
from nfnet_jax.storage import lock
lock._RENEW_S = 0.05
with lock.lock_folder(sys.argv[1]):
  print('locked', flush=True)
  sys.stdin.read()
"""


@contextlib.contextmanager
def holder_of(folder):
  """A process that holds the lock until its input ends."""
  process = subprocess.Popen(
    [sys.executable, '-c', _HOLD, folder],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    assert process.stdout.readline() == 'locked\n'
    yield process
  finally:
    process.kill()
    process.wait()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  monkeypatch.setattr(lock, '_POLL_S', 0.1)


def lock_once(folder):
  with lock.lock_folder(folder):
    pass


@pytest.fixture(params=['disk', 'bucket'])
def folder(request, tmp_path, buckets):
  if request.param == 'disk':
    return str(tmp_path / 'run')
  buckets.objects['locks'] = {}
  return 'gs://locks/run'


def test_excludes_others_until_it_ends(folder):
  with holder_of(folder) as process:
    holder = f"'{folder}' is in use by process {process.pid} on "
    with pytest.raises(errors.RunError, match=holder):
      lock_once(folder)
    process.stdin.close()
    assert process.wait() == 0
    lock_once(folder)


def test_takes_over_from_a_killed_process(folder):
  with holder_of(folder) as process:
    process.send_signal(signal.SIGKILL)
    process.wait()
    lock_once(folder)


def test_leaves_no_file(tmp_path):
  with lock.lock_folder(tmp_path):
    assert (tmp_path / lock.FILE).exists()
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('text', ['', 'null', '{"host"', '{"process": "x"}'])
def test_damaged_file_is_replaced(tmp_path, text):
  (tmp_path / lock.FILE).write_text(text)
  with lock.lock_folder(tmp_path):
    assert json.loads((tmp_path / lock.FILE).read_text())['process']


class TestObject:
  @pytest.fixture
  def old(self, buckets):
    """Put the lock of another host there, and return a function for its age."""
    buckets.objects['locks'] = {}
    text = json.dumps({'host': 'other', 'process': 1, 'since': 'today'})
    buckets.put('locks', 'run/lock.json', text.encode())

    def set_age(seconds):
      age = datetime.timedelta(seconds=seconds)
      now = datetime.datetime.now(datetime.UTC)
      buckets.updated['locks', 'run/lock.json'] = now - age

    return set_age

  def test_counts_until_it_expires(self, old):
    old(lock._EXPIRE_S - 1)
    start = time.monotonic()
    lock_once('gs://locks/run')
    assert time.monotonic() - start > 0.9

  def test_is_renewed(self, buckets, monkeypatch):
    monkeypatch.setattr(lock, '_RENEW_S', 0.05)
    buckets.objects['locks'] = {}
    buckets.requests.clear()
    with lock.lock_folder('gs://locks/run'):
      deadline = time.monotonic() + 20
      while [method for method, _ in buckets.requests].count('POST') < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not buckets.objects['locks']

  def test_losing_it_ends_the_process(self, buckets, tmp_path):
    buckets.objects['locks'] = {}
    with holder_of('gs://locks/run') as process:
      buckets.put('locks', 'run/lock.json', b'{"host": "other"}')
      assert process.wait(20) == 1
      assert 'has taken over gs://locks/run/lock.json' in process.stderr.read()

  def test_a_failed_read_does_not_take_it_back(self):
    """The generation of another process's lock is not taken for our own."""

    class Blob:
      generation, is_down = 5, True

      def upload_from_string(self, text, if_generation_match):
        if if_generation_match != 7:
          raise exceptions.PreconditionFailed('Another generation')

      def reload(self):
        self.generation = 7

      def download_as_bytes(self):
        if self.is_down:
          raise ConnectionError
        return b'{"host": "other"}'

    held = lock._ObjectLock(Blob(), {'host': 'mine'}, 5)
    with pytest.raises(ConnectionError):
      held.write(held.generation)
    held.blob.is_down = False
    assert not held.write(held.generation)
