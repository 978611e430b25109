"""Starts real processes, alone or together, and reads what becomes of them."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

TRAIN = 'nfnet_jax.experiments.train'
LIMIT = 200  # Seconds that anything may take on a busy machine.


def free_port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


class Process:
  """A process; `devices` is how many stand-ins for TPU cores it has."""

  def __init__(self, door, *arguments, log, devices=8):
    log.parent.mkdir(parents=True, exist_ok=True)
    self._log = log
    flags = f'--xla_force_host_platform_device_count={devices}'
    with log.open('w') as stream:
      self._popen = subprocess.Popen(
        [sys.executable, '-m', door, *map(str, arguments)],
        stdout=stream,
        stderr=stream,
        env=os.environ | {'XLA_FLAGS': flags},
      )

  @property
  def said(self):
    return self._log.read_text()

  @property
  def lines(self):
    """What it said, without what JAX's collectives say on a CPU."""
    lines = self.said.splitlines()
    return [line for line in lines if not line.startswith('[Gloo]')]

  def wait_for(self, text):
    deadline = time.monotonic() + LIMIT
    while text not in self.said:
      ended = self._popen.poll() is not None
      hopeless = ended or time.monotonic() > deadline
      assert not hopeless or text in self.said, f"No '{text}':\n{self.said}"
      time.sleep(0.05)

  def send(self, number):
    self._popen.send_signal(number)

  def finish(self, seconds=LIMIT):
    """Returns its exit code."""
    try:
      return self._popen.wait(seconds)
    finally:
      self._popen.kill()


class Pod(list):
  """The processes of one run on this machine."""

  def __init__(
    self, folder, door, *arguments, count, devices=1, absent=(), workdirs=None
  ):
    logs, port = folder / f'logs{time.monotonic_ns()}', free_port()
    for index in set(range(count)) - set(absent):
      place = [
        f'--coordinator=127.0.0.1:{port}',
        f'--num_processes={count}',
        f'--process_id={index}',
      ]
      if workdirs:
        place.append(f'--workdir={workdirs[index]}')
      self.append(
        Process(
          door,
          *arguments,
          *place,
          log=logs / f'{index}.txt',
          devices=devices,
        )
      )

  @property
  def said(self):
    return '\n'.join(process.said for process in self)

  def finish(self, seconds=LIMIT):
    """Returns the exit codes."""
    try:
      return [process.finish(seconds) for process in self]
    finally:
      for process in self:
        process.finish()


def rows_of(workdir):
  text = (pathlib.Path(workdir) / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def checkpoints_of(workdir):
  folder = pathlib.Path(workdir) / 'checkpoints'
  if not folder.exists():
    return []
  names = (path.name for path in folder.iterdir())
  return sorted(int(name) for name in names if name.isdigit())
