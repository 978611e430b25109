"""Time per activity, on a clock that the test sets."""

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
  stopwatch = timing.Stopwatch()
  clock(1)
  with stopwatch.during(timing.TRAINING):
    clock(2)
    with stopwatch.during(timing.DATA):
      clock(4)
      assert stopwatch.seconds(timing.DATA) == 4
    clock(8)
    with (
      contextlib.suppress(ZeroDivisionError),
      stopwatch.during(timing.SAVING),
    ):
      clock(16)
      raise ZeroDivisionError
    clock(32)
  clock(64)
  assert stopwatch.seconds(timing.OTHER) == 1 + 64
  assert stopwatch.seconds(timing.TRAINING) == 2 + 8 + 32
  assert stopwatch.seconds(timing.TRAINING, timing.SAVING) == 42 + 16
  assert stopwatch.seconds(timing.EVALUATING) == 0
  assert stopwatch.total() == 127


def test_images_per_second_count_training_after_the_first_step(clock):
  stopwatch = timing.Stopwatch()
  speed = timing.Throughput(stopwatch, batch_size=10)
  assert speed.lap() == speed.overall() == {}
  with stopwatch.during(timing.COMPILING):
    clock(50)
  speed.steps = 1
  assert speed.lap() == speed.overall() == {}
  with stopwatch.during(timing.TRAINING):
    clock(3)
    with stopwatch.during(timing.DATA):
      clock(1)
    with stopwatch.during(timing.EVALUATING):
      clock(70)
  speed.steps = 3
  first = {'images_per_second': 5, 'data_wait': 0.25}
  assert speed.lap() == speed.overall() == first
  with stopwatch.during(timing.TRAINING):
    clock(4)
  speed.steps = 7
  assert speed.lap() == {'images_per_second': 10, 'data_wait': 0}
  assert speed.overall() == {'images_per_second': 7.5, 'data_wait': 0.125}


def test_progress_shows_the_speed_in_total_and_per_device():
  output = io.StringIO()
  row = {'loss': 2, 'top1': 0.5, 'images_per_second': 80.0, 'data_wait': 0.25}
  with progress.Progress(0, 20, 8, output) as shown:
    shown.update(10, row)
  with progress.Progress(0, 20, 8, output, devices=16) as shown:
    shown.update(10, row)
    shown.update(20, {'loss': 1, 'top1': 0.5})
  first, second, last = output.getvalue().splitlines()
  assert 'step 10/20' in first
  assert 'img/s 80  data 25%' in first
  assert first.endswith('eta 00:01')
  assert 'img/s 80 (5 per device)  data 25%' in second
  assert 'img/s 80 (5 per device)  data 0%' in last
