"""Traces of the loop: their steps, and how they end."""

import gzip
import json
import os
import signal

import jax
import numpy as np
import pytest

from nfnet_jax.distributed import preemption
from nfnet_jax.training import nonfinite, profiling
from tests.training import linear_runs


def traced(workdir, steps, **changes):
  """Run the loop with a tracer, and return the tracer's messages."""
  messages = []
  tracer = profiling.Tracer(workdir, steps, messages.append)
  run = linear_runs.Run(workdir, tracer=tracer, **changes)
  try:
    run.go()
  except (preemption.Interrupted, nonfinite.NonFiniteError):
    assert changes
  return messages


def steps_in(folder):
  """List the numbers of the steps in a trace."""
  path = folder / 'process_0.xplane.pb'
  data = jax.profiler.ProfileData.from_serialized_xspace(path.read_bytes())
  return sorted(
    dict(event.stats)['step_num']
    for plane in data.planes
    for line in plane.lines
    for event in line.events
    if event.name.startswith('train')
  )


def test_trace_holds_the_requested_steps(tmp_path):
  # An evaluation and a checkpoint happen in between, after step 5.
  (line,) = traced(tmp_path, range(3, 6))
  folder = tmp_path / 'profile' / 'plugins' / 'profile' / '3-6'
  assert line == f'profile of steps 3 to 6: {folder}'
  assert {path.name for path in folder.iterdir()} == {
    'process_0.xplane.pb',
    'process_0.perfetto_trace.json.gz',
  }
  assert steps_in(folder) == [3, 4, 5]
  packed = (folder / 'process_0.perfetto_trace.json.gz').read_bytes()
  assert json.loads(gzip.decompress(packed))['traceEvents']


def test_trace_of_the_whole_run_changes_nothing(tmp_path):
  (tmp_path / 'plain').mkdir()
  plain = linear_runs.Run(tmp_path / 'plain')
  plain.go()
  (tmp_path / 'whole').mkdir()
  traced(tmp_path / 'whole', range(12))
  folder = profiling.folder_of(tmp_path / 'whole', range(12))
  assert steps_in(folder) == list(range(12))
  linear_runs.assert_same_run(linear_runs.Run(tmp_path / 'whole'), plain)


def test_tracer_waits_for_the_devices_at_both_ends(tmp_path, monkeypatch):
  seen = []

  def record(name):
    original = getattr(jax.profiler, name)

    def recording(*args, **options):
      seen.append((name, all(leaf.is_ready() for leaf in states[-1])))
      return original(*args, **options)

    monkeypatch.setattr(jax.profiler, name, recording)

  record('start_trace')
  record('stop_trace')
  states = []
  for name in ('begin_at', 'end_at'):
    method = getattr(profiling.Tracer, name)

    def remembering(self, step, state, method=method):
      states.append(jax.tree.leaves(state))
      method(self, step, state)

    monkeypatch.setattr(profiling.Tracer, name, remembering)
  traced(tmp_path, range(3, 6))
  assert seen == [('start_trace', True), ('stop_trace', True)]


def test_without_a_trace_the_profiler_is_never_called(tmp_path, monkeypatch):
  monkeypatch.setattr(jax.profiler, 'start_trace', None)
  monkeypatch.setattr(jax.profiler, 'StepTraceAnnotation', None)
  assert traced(tmp_path, range(0)) == []


def interrupted(first):
  for batch in linear_runs.train_batches(first):
    if batch['step'] == 4:
      os.kill(os.getpid(), signal.SIGTERM)
    yield batch


def poisoned(first):
  for batch in linear_runs.train_batches(first):
    if batch['step'] == 4:
      batch['image'][0, 0, 0, 0] = np.nan
    yield batch


@pytest.mark.parametrize('batches', [interrupted, poisoned])
def test_run_that_ends_early_writes_its_trace(tmp_path, batches):
  (line,) = traced(tmp_path, range(1, 9), train_batches=batches)
  folder = profiling.folder_of(tmp_path, range(1, 9))
  steps = steps_in(folder)
  assert steps == list(range(1, steps[-1] + 1))
  assert len(steps) < 8
  assert line == f'profile of steps 1 to {steps[-1] + 1}: {folder}'
  # The next trace can begin.
  traced(tmp_path / 'again', range(1, 3))


def test_trace_that_cannot_be_written_does_not_end_the_run(tmp_path):
  (tmp_path / 'profile').write_text('a file')
  (line,) = traced(tmp_path, range(3, 6))
  assert line.startswith('profile of steps 3 to 6: not written (')
  assert linear_runs.Run(tmp_path).saved()[-1] == 12


def test_trace_that_cannot_begin_does_not_end_the_run(tmp_path, monkeypatch):
  def refuse(folder, **options):
    folders.append(folder)
    raise RuntimeError('another profile is active')

  folders = []
  monkeypatch.setattr(jax.profiler, 'start_trace', refuse)
  (line,) = traced(tmp_path, range(3, 6))
  assert (
    line == 'profile of steps 3 to 6: not taken (another profile is active)'
  )
  assert not os.path.exists(*folders)
  assert linear_runs.Run(tmp_path).saved()[-1] == 12
