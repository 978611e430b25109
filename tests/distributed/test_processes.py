"""Tests of the start and the end of processes, without other processes."""

import os
import signal
import socket
import subprocess
import sys

import jax
import pytest

from nfnet_jax import errors
from nfnet_jax.distributed import preemption, processes

CLUSTERS = (
  'SLURM_STEP_NODELIST',
  'OMPI_MCA_orte_hnp_uri',
  'JOB_COMPLETION_INDEX',
)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
  """The calls of `jax.distributed.initialize`, which detects nothing."""
  calls = []

  def initialize(*arguments, **options):
    calls.append((arguments, options))
    raise ValueError('coordinator_address should be defined.')

  for name in CLUSTERS:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  return calls


class TestSingleProcess:
  def test_host_without_a_scheduler_joins_nothing(self, calls):
    processes.start()
    assert not calls
    assert processes.is_primary()
    assert not processes.are_several()
    processes.finish()

  def test_num_processes_1_joins_nothing_on_a_cluster(self, monkeypatch, calls):
    monkeypatch.setenv('SLURM_STEP_NODELIST', 'node[1-9]')
    processes.start(num_processes=1)
    assert not calls

  def test_kubernetes_pod_without_an_index_joins_nothing(
    self, monkeypatch, calls
  ):
    monkeypatch.setenv('KUBERNETES_SERVICE_HOST', '10.0.0.1')
    processes.start()
    assert not calls


class TestArguments:
  @pytest.mark.parametrize(
    'arguments',
    [
      {'coordinator': 'a:1'},
      {'num_processes': 2},
      {'process_id': 0},
      {'coordinator': 'a:1', 'num_processes': 2},
      {'num_processes': 2, 'process_id': 1},
    ],
  )
  def test_incomplete_ones_are_refused(self, arguments):
    with pytest.raises(errors.InputError, match='need all of --coordinator'):
      processes.start(**arguments)

  @pytest.mark.parametrize('index', [-1, 2])
  def test_index_out_of_range_is_refused(self, index):
    with pytest.raises(errors.InputError, match=rf'={index} is not in \[0'):
      processes.start('a:1', 2, index)

  @pytest.mark.parametrize('address', ['host0', 'host0:', ':1', 'host0:http'])
  def test_address_without_a_port_is_refused(self, address):
    with pytest.raises(errors.InputError, match='is not HOST:PORT'):
      processes.start(address, 2, 0)

  @pytest.mark.parametrize('shared', [False, True])
  def test_port_in_use_is_reported(self, calls, shared):
    """JAX itself would share the port with another run, which then aborts."""
    with socket.socket(socket.AF_INET6) as other:
      other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
      other.bind(('::', 0))
      other.listen()
      port = other.getsockname()[1]
      with pytest.raises(errors.RunError, match=f'port {port} .* Choose'):
        processes.start(f'127.0.0.1:{port}', 2, 0)
    assert not calls

  def test_other_errors_of_jax_are_not_hidden(self, calls):
    with pytest.raises(ValueError, match='coordinator_address'):
      processes.start('a:0', 2, 0)
    ((arguments, options),) = calls
    assert arguments == ('a:0', 2, 0)
    assert options['cluster_detection_method'] == 'deactivate'


class TestClusters:
  @pytest.mark.parametrize('variable', CLUSTERS)
  def test_undetected_job_of_a_scheduler_is_refused(
    self, calls, monkeypatch, variable
  ):
    monkeypatch.setenv(variable, '0')
    # Else every process would train separately, in one workdir.
    with pytest.raises(errors.InputError, match=f'{variable} is set by a job'):
      processes.start(timeout=70)
    ((arguments, options),) = calls
    assert arguments == (None, None, None)
    assert options['cluster_detection_method'] is None
    # JAX aborts at its own timeout.
    assert options['initialization_timeout'] > 70
    assert options['heartbeat_timeout_seconds'] == 70

  @pytest.mark.parametrize('platforms', ['cpu', 'tpu,cpu'])
  def test_tpu_vm_asks_jax_unless_it_computes_on_cpu(self, calls, platforms):
    before = jax.config.jax_platforms
    try:
      jax.config.update('jax_platforms', platforms)
      processes.start()
    finally:
      jax.config.update('jax_platforms', before)
    assert len(calls) == ('tpu' in platforms)

  def test_error_while_joining_may_pass(self, monkeypatch):
    def initialize(*arguments, **options):
      raise RuntimeError('Kubernetes API Error: 403\nIt appears that ...')

    monkeypatch.setenv('JOB_COMPLETION_INDEX', '0')
    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    with pytest.raises(errors.RunError, match='403 It appears'):
      processes.start()


@pytest.mark.parametrize(
  ('statement', 'expected'),
  [
    ("exit_alone('bad data.', 2)", (2, 'nfnet_jax: bad data.\n')),
    ("sys.stderr.close(); exit_alone('unread', 2)", (2, '')),
    ("\nwith exit_after(0.1, 'late.'): wait()", (1, 'nfnet_jax: late.\n')),
    ("\nwith exit_after(60, 'late.'): pass", (0, '')),
  ],
)
def test_exit_of_one_process(statement, expected):
  """Even if a thread and an exit handler never return."""
  program = f"""
import atexit, sys, threading
from nfnet_jax.distributed.processes import exit_after, exit_alone
wait = threading.Event().wait
if '60' not in {statement!r}:
  threading.Thread(target=wait).start()
  atexit.register(wait)
{statement}
"""
  run = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, timeout=60
  )
  assert (run.returncode, run.stderr) == expected


@pytest.fixture
def several(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)


@pytest.mark.usefixtures('several')
class TestStopOfSeveral:
  def test_polls_are_numbered(self, monkeypatch):
    polls = []
    monkeypatch.setattr(
      preemption.multihost_utils,
      'reached_preemption_sync_point',
      lambda poll: polls.append(poll) or poll == 3,
    )
    before = signal.getsignal(signal.SIGTERM)
    with preemption.StopRequest() as stop:
      assert signal.getsignal(signal.SIGTERM) is before  # JAX's own.
      assert [stop.poll() for _ in range(4)] == [False, False, True, False]
    assert polls == [1, 2, 3, 4]

  def test_ctrl_c_in_one_process_stops_all(self, monkeypatch):
    sent = []
    with preemption.StopRequest():
      monkeypatch.setattr(os, 'kill', lambda *what: sent.append(what))
      signal.raise_signal(signal.SIGINT)
    assert sent == [(os.getpid(), signal.SIGTERM)]
