"""Where time goes, on a clock that the test winds."""

import contextlib
import io

import pytest

from nfnet_jax.training import progress, timing


@pytest.fixture
def clock(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(timing.time, 'perf_counter', lambda: now[0])

  def wait(seconds):
    now[0] += seconds

  return wait


def test_no_second_counts_twice(clock):
  watch = timing.Stopwatch()
  clock(1)
  with watch.during(timing.TRAINING):
    clock(2)
    with watch.during(timing.DATA):
      clock(4)
      assert watch.seconds(timing.DATA) == 4
    clock(8)
    with contextlib.suppress(ZeroDivisionError), watch.during(timing.SAVING):
      clock(16)
      raise ZeroDivisionError
    clock(32)
  clock(64)
  assert watch.seconds(timing.OTHER) == 1 + 64
  assert watch.seconds(timing.TRAINING) == 2 + 8 + 32
  assert watch.seconds(timing.TRAINING, timing.SAVING) == 42 + 16
  assert watch.seconds(timing.EVALUATING) == 0
  assert watch.total() == 127


def test_images_a_second_leave_out_the_first_step_and_all_but_training(clock):
  watch = timing.Stopwatch()
  speed = timing.Throughput(watch, batch_size=10)
  assert speed.lap() == speed.overall() == {}
  with watch.during(timing.COMPILING):
    clock(50)
  speed.steps = 1
  assert speed.lap() == speed.overall() == {}
  with watch.during(timing.TRAINING):
    clock(3)
    with watch.during(timing.DATA):
      clock(1)
    with watch.during(timing.EVALUATING):
      clock(70)
  speed.steps = 3
  first = {'images_per_second': 5, 'data_wait': 0.25}
  assert speed.lap() == speed.overall() == first
  with watch.during(timing.TRAINING):
    clock(4)
  speed.steps = 7
  assert speed.lap() == {'images_per_second': 10, 'data_wait': 0}
  assert speed.overall() == {'images_per_second': 7.5, 'data_wait': 0.125}


def test_progress_tells_the_speed_of_all_devices_and_of_each():
  said = io.StringIO()
  row = {'loss': 2, 'top1': 0.5, 'images_per_second': 80.0, 'data_wait': 0.25}
  with progress.Progress(0, 20, 8, said) as shown:
    shown.update(10, row)
  with progress.Progress(0, 20, 8, said, devices=16) as shown:
    shown.update(10, row)
    shown.update(20, {'loss': 1, 'top1': 0.5})
  first, second, last = said.getvalue().splitlines()
  assert 'step 10/20' in first
  assert 'img/s 80  data 25%' in first
  assert first.endswith('eta 00:01')
  assert 'img/s 80 (5 a device)  data 25%' in second
  assert 'img/s 80 (5 a device)  data 0%' in last
