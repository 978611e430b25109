"""Starts real processes, alone or together, and reads what becomes of them."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time

TRAIN = 'nfnet_jax.experiments.train'
LIMIT = 200  # Seconds that anything may take on a busy machine.


def free_port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


class Process:
  """A process whose words are kept.

  `devices` is how many stand-ins for TPU cores it has, `largest_file` how many
  bytes the file system lets it put into a file, `late` by how many seconds it
  starts too late, `environment` what differs in its own.
  """

  def __init__(
    self,
    run_command,
    *arguments,
    devices=8,
    largest_file=None,
    late=0,
    environment=None,
  ):
    # The last of two settings holds; the others are those of the tests.
    flags = os.environ['XLA_FLAGS']
    flags += f' --xla_force_host_platform_device_count={devices}'
    command = [sys.executable, '-m', run_command, *map(str, arguments)]
    if late:
      command = ['sh', '-c', f'sleep {late}; exec "$@"', 'sh', *command]
    if largest_file:
      limit = 'import os, resource, sys; resource.setrlimit('
      limit += f'resource.RLIMIT_FSIZE, ({largest_file},) * 2); '
      limit += 'os.execv(sys.argv[1], sys.argv[1:])'
      command = [sys.executable, '-c', limit, *command]
    self._popen = subprocess.Popen(
      command,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      env=os.environ | {'XLA_FLAGS': flags} | (environment or {}),
      text=True,
    )
    self._said = []
    # Read at once: a process waits where nobody does.
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  def _read(self):
    self._said.extend(iter(self._popen.stdout.readline, ''))

  @property
  def said(self):
    return ''.join(self._said)

  @property
  def lines(self):
    """What it said, without what JAX's collectives say on a CPU."""
    # They talk at once: lines may be in pieces.
    noise = re.compile(r'.*(\[Gloo\] Rank|peer ranks).*|[\d\s]*')
    return [x for x in self.said.splitlines() if not noise.fullmatch(x)]

  @property
  def last_word(self):
    """The last line that is ours: JAX may say at once that it lost another."""
    ours = [x for x in self.lines if x.startswith('nfnet_jax: ')]
    assert ours, self.said
    return ours[-1]

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
      self._reader.join(LIMIT)


class Pod(list):
  """The processes of one run on this machine."""

  def __init__(
    self, run_command, *arguments, count, devices=1, absent=(), **own
  ):
    """Starts them.

    Args:
      door: module to run.
      *arguments: of all of them.
      count: how many there are.
      devices: of each.
      absent: which of them do not come.
      **own: further options of single processes, such as `of_0={...}`; what is
        `arguments` there is added to those of all.
    """
    port = free_port()
    for index in sorted(set(range(count)) - set(absent)):
      options = dict(own.get(f'of_{index}', {}))
      place = [
        f'--coordinator=127.0.0.1:{port}',
        f'--num_processes={count}',
        f'--process_id={index}',
        *options.pop('arguments', ()),
      ]
      self.append(
        Process(run_command, *arguments, *place, devices=devices, **options)
      )

  @property
  def said(self):
    return '\n'.join(process.said for process in self)

  def finish(self, seconds=LIMIT):
    """Returns the exit codes."""
    deadline = time.monotonic() + seconds
    codes = []
    for process in self:
      try:
        codes.append(process.finish(max(0, deadline - time.monotonic())))
      except subprocess.TimeoutExpired:
        codes.append(None)
    assert None not in codes, f'{codes} after {seconds} s:\n{self.said}'
    return codes


def rows_of(workdir):
  text = (pathlib.Path(workdir) / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def checkpoints_of(workdir):
  folder = pathlib.Path(workdir) / 'checkpoints'
  if not folder.exists():
    return []
  names = (path.name for path in folder.iterdir())
  return sorted(int(name) for name in names if name.isdigit())
