"""What the time of a run went into, across restarts."""

import json

import pytest

from nfnet_jax.training import goodput, timing


class Stopwatch:
  """Times that the test sets."""

  def __init__(self, **times):
    self.times = times

  def seconds(self, activity):
    return self.times.get(activity, 0.0)

  def total(self):
    return sum(self.times.values())


@pytest.fixture
def clock(monkeypatch):
  class Clock:
    now = 1000.0

  monkeypatch.setattr(goodput.time, 'time', lambda: Clock.now)
  return Clock


def test_shares_of_a_killed_run_that_resumes(tmp_path, clock):
  first = Stopwatch(compiling=10.0, training=20.0)
  killed = goodput.Goodput(tmp_path, 0, stopwatch := Stopwatch())
  stopwatch.times = first.times
  killed.record(10)
  # It began at 1000, and was killed after 30 s; 6 of 10 steps were saved.
  clock.now = 1050.0
  resumed = goodput.Goodput(tmp_path, 6, stopwatch := Stopwatch())
  stopwatch.times = {'compiling': 10.0, 'training': 36.0, 'data': 4.0}
  resumed.record(24)
  assert resumed.seconds() == {
    'steps': 12.0 + 36.0,
    'repeated steps': 8.0,
    'stopped': 20.0,
    'compiling': 20.0,
    'waiting for data': 4.0,
    'evaluating': 0.0,
    'saving': 0.0,
    'starting and ending': 0.0,
  }
  shares = resumed.shares()
  assert shares['goodput'] == 0.48
  assert sum(shares.values()) == pytest.approx(1)
  assert len((tmp_path / goodput.FILE).read_text().splitlines()) == 2


def test_no_record_without_a_workdir(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  goodput.Goodput().record(3)
  assert not list(tmp_path.iterdir())


def test_bucket_is_written_only_to_publish(buckets):
  objects = buckets.objects['times'] = {}
  here = goodput.Goodput('gs://times/run')
  here.record(1, publish=False)
  assert not objects
  here.record(2)
  assert json.loads(objects['run/time.jsonl'])['step'] == 2


@pytest.mark.parametrize(
  'text', ['', '{', 'null\n', '{"began": 1}\n', '\xff', '[]']
)
def test_damaged_record_is_replaced(tmp_path, text):
  (tmp_path / goodput.FILE).write_bytes(text.encode('latin-1'))
  goodput.Goodput(tmp_path).record(1)
  (start,) = goodput.read_starts(tmp_path / goodput.FILE)
  assert start.step == 1
  assert set(start.seconds) == set(timing.ACTIVITIES)
