"""Starts of a run in one or more processes, and what they leave behind."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np

from nfnet_jax.training import checkpoint

STEPS = 40
RECIPE = (
  '--config=digits',
  f'--config.train_for={STEPS} steps',
  '--config.optimizer.warmup=5 steps',
  '--config.run.log_every=2 steps',
  '--config.run.eval_every=10 steps',
  '--config.run.checkpoint_every=4 steps',
  '--config.run.keep_checkpoints=99',
)
LIMIT_S = 300
_FIELDS = 'step', 'params', 'model_state', 'opt_state', 'ema_params'


class Attempt:
  """One start of the run.

  Attributes:
    processes: its processes; process 0 writes the workdir.
  """

  def __init__(self, workdir: pathlib.Path, count: int):
    """Start `count` processes."""
    self._phases = workdir.with_suffix('.phases')
    self._phases.write_text('')
    self._log = workdir.with_suffix('.log')
    with socket.socket() as probe:
      probe.bind(('127.0.0.1', 0))
      port = probe.getsockname()[1]
    command = [sys.executable, '-m', 'experiments.soak.traced_train']
    command += [f'--workdir={workdir}', *RECIPE]
    if count > 1:
      command += [f'--coordinator=127.0.0.1:{port}', f'--num_processes={count}']
      command += ['--peer_timeout=10']
    log = self._log.open('w')
    self.processes = []
    for index in range(count):
      ours = self._phases if not index else os.devnull
      self.processes.append(
        subprocess.Popen(
          command + ([f'--process_id={index}'] if count > 1 else []),
          stdout=log,
          stderr=log,
          env=os.environ | {'PHASES': str(ours)},
        )
      )

  def phases(self) -> list[tuple[float, str]]:
    """Return when each phase began, as seconds since 1970, and its name."""
    lines = self._phases.read_text().splitlines()
    pairs = [line.split() for line in lines]
    return [(float(pair[0]), pair[1]) for pair in pairs if len(pair) == 2]

  def wait_for(self, phase: str, occurrence: int, shortest_s: float) -> bool:
    """Wait until a phase has begun so often.

    Args:
      phase: its name.
      occurrence: how often, from 1.
      shortest_s: phases that were shorter do not count.

    Returns:
      False if process 0 ended first.
    """
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
      began = self.phases()
      ends = [start for start, _ in began[1:]] + [time.time()]
      count = sum(
        name == phase and end - start >= shortest_s
        for (start, name), end in zip(began, ends)
      )
      if count >= occurrence:
        return True
      if self.processes[0].poll() is not None:
        return False
      time.sleep(0.001)
    raise TimeoutError(f'no {phase}: {self.output}')

  def finish(self) -> list[int]:
    """Wait for all processes; return their exit codes."""
    return [process.wait(LIMIT_S) for process in self.processes]

  @property
  def output(self) -> str:
    return self._log.read_text()


def saved_steps(workdir: pathlib.Path) -> list[int]:
  """Return the steps whose checkpoints are complete."""
  folder = workdir / 'checkpoints'
  if not folder.exists():
    return []
  return sorted(int(x.name) for x in folder.iterdir() if x.name.isdigit())


def is_writing(workdir: pathlib.Path) -> bool:
  """Return whether a checkpoint is being written."""
  return any(workdir.glob('checkpoints/*.orbax-checkpoint-tmp*'))


def last_save(workdir: pathlib.Path) -> float:
  """Return when the newest checkpoint was complete, 0 if there is none."""
  steps = saved_steps(workdir)
  if not steps:
    return 0.0
  return (workdir / 'checkpoints' / str(steps[-1])).stat().st_mtime


def results(workdir: pathlib.Path) -> tuple[str, list[np.ndarray]]:
  """Return the text of the metrics, and the final state."""
  text = (workdir / 'metrics.jsonl').read_text()
  folder = workdir / 'checkpoints'
  with checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
    return text, jax.tree.leaves(checkpoints.restore_fields(_FIELDS, STEPS))


def assert_equal(workdir: pathlib.Path, reference: tuple) -> None:
  """Raise an error if a finished run differs from the reference in a bit."""
  text, state = results(workdir)
  expected_text, expected = reference
  if text != expected_text:
    raise AssertionError(f'{workdir}: other metrics')
  for leaf, other in zip(state, expected, strict=True):
    np.testing.assert_array_equal(leaf, other)
