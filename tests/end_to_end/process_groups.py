"""Real processes on this machine, one or a group, and their output.

If `FAILURE_MATRIX` names a file, the outcome of every fault is added to it as a
row of a Markdown table: see `ProcessGroup.report`.
"""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

TRAIN = 'nfnet_jax.experiments.train'
LIMIT = 200  # Seconds; enough for every wait on a busy machine.
# Exit codes after the loss of another process: its own, or JAX's abort.
LOST = {1, -signal.SIGABRT}


def free_port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


class Process:
  """A process that runs a module, and its output.

  Attributes:
    output: what it has printed so far, standard error included.
  """

  def __init__(
    self,
    module,
    *arguments,
    devices=8,
    largest_file=None,
    late=0,
    environment=None,
    as_root=True,
  ):
    """Start the process.

    Args:
      module: the module to run.
      *arguments: its command line.
      devices: the number of its CPU devices.
      largest_file: the largest number of bytes that it can write to a file.
      late: seconds before it starts.
      environment: variables that it has in addition to those of the tests.
      as_root: whether it may read files without permission if it runs as root.
    """
    # XLA uses the last of two values of a flag.
    flags = os.environ['XLA_FLAGS']
    flags += f' --xla_force_host_platform_device_count={devices}'
    command = [sys.executable, '-m', module, *map(str, arguments)]
    if not as_root and os.geteuid() == 0:
      unable = '--bounding-set=-dac_override,-dac_read_search'
      command = ['setpriv', unable, *command]
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
    self._printed = []
    # Read at once, or the process blocks on a full pipe.
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  def _read(self):
    self._printed.extend(iter(self._popen.stdout.readline, ''))

  @property
  def output(self):
    return ''.join(self._printed)

  @property
  def lines(self):
    """The lines of the output, without those of JAX's CPU collectives."""
    # Several threads write at the same time, so lines may be broken.
    noise = re.compile(r'.*(\[Gloo\] Rank|peer ranks).*|[\d\s]*')
    return [x for x in self.output.splitlines() if not noise.fullmatch(x)]

  @property
  def last_message(self):
    """The last line of nfnet_jax, else that of JAX's abort; '' if none."""
    ours = re.findall('^nfnet_jax: .*', self.output, re.M)
    # After a loss, CPU collectives may also mix up what the survivors send.
    aborts = re.findall(
      "Terminating process because [^.\\n]*|Received data size doesn't match",
      self.output,
    )
    return (ours or aborts or [''])[-1]

  def wait_for(self, text):
    self.wait_until(lambda: text in self.output, f"'{text}'")

  def wait_until(self, condition, name):
    deadline = time.monotonic() + LIMIT
    while not condition():
      ended = self._popen.poll() is not None
      is_over = ended or time.monotonic() > deadline
      assert not is_over or condition(), f'No {name}:\n{self.output}'
      time.sleep(0.05)

  def send(self, number):
    self._popen.send_signal(number)

  def finish(self, seconds=LIMIT):
    """Wait for the exit; return the exit code."""
    try:
      return self._popen.wait(seconds)
    finally:
      self._popen.kill()
      self._reader.join(LIMIT)


class ProcessGroup(list):
  """The processes of one run on this machine."""

  def __init__(
    self, module, *arguments, count, devices=1, absent=(), **options_of
  ):
    """Start the processes.

    Args:
      module: the module to run.
      *arguments: the command line of all processes.
      count: the number of processes.
      devices: the number of devices per process.
      absent: the processes that are not started.
      **options_of: options of single processes, such as `of_0={...}`; those of
        `Process`, and `arguments`, which are added to those of all processes.
    """
    port = free_port()
    self._count = count
    self._started = sorted(set(range(count)) - set(absent))
    for index in self._started:
      options = dict(options_of.get(f'of_{index}', {}))
      address = [
        f'--coordinator=127.0.0.1:{port}',
        f'--num_processes={count}',
        f'--process_id={index}',
        *options.pop('arguments', ()),
      ]
      self.append(
        Process(module, *arguments, *address, devices=devices, **options)
      )

  @property
  def output(self):
    return '\n'.join(process.output for process in self)

  def finish(self, seconds=LIMIT, fault=''):
    """Wait for all exits; return the exit codes.

    Args:
      seconds: the limit for all exits.
      fault: what went wrong, for the table of failures.
    """
    start = time.monotonic()
    deadline = start + seconds
    codes = []
    for process in self:
      try:
        codes.append(process.finish(max(0, deadline - time.monotonic())))
      except subprocess.TimeoutExpired:
        codes.append(None)
    assert None not in codes, f'{codes} after {seconds} s:\n{self.output}'
    if fault:
      self.report(fault, codes, time.monotonic() - start)
    return codes

  def report(self, fault, codes, seconds):
    """Add a row to the table of failures, if there is one.

    Args:
      fault: what went wrong.
      codes: the exit codes of the processes that were started.
      seconds: the time from the fault until all had ended.
    """
    if 'FAILURE_MATRIX' in os.environ:
      cells = ['' for _ in range(self._count)]
      for index, code, process in zip(self._started, codes, self, strict=True):
        ended = code < 0 and -code != signal.SIGABRT
        cells[index] = f'{code}' if ended else f'{code}: {outcome_of(process)}'
      row = f'| {" | ".join([fault, *cells])} | {seconds:.0f} s |\n'
      with open(os.environ['FAILURE_MATRIX'], 'a') as table:
        table.write(row)


def outcome_of(process):
  """Return the start of the last message, without what differs between runs."""
  text = (process.last_message or process.lines[-1]).removeprefix('nfnet_jax: ')
  text = re.sub(r'/\S*/run\b', 'WORKDIR', text).replace('|', '/')
  return text if len(text) <= 90 else f'{text[:87]}...'


def rows_of(workdir):
  text = (pathlib.Path(workdir) / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def checkpoints_of(workdir):
  folder = pathlib.Path(workdir) / 'checkpoints'
  if not folder.exists():
    return []
  names = (path.name for path in folder.iterdir())
  return sorted(int(name) for name in names if name.isdigit())
