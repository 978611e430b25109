"""Tests of the start and the end of processes, without other processes."""

import itertools
import os
import signal
import sys
import threading

import jax
import pytest

from nfnet_jax.distributed import preemption, processes
from tests.distributed import fake_processes

CLUSTERS = (
  'SLURM_STEP_NODELIST',
  'OMPI_MCA_orte_hnp_uri',
  'JOB_COMPLETION_INDEX',
)


class Exited(BaseException):
  """Raised in place of the exit of the process."""


@pytest.fixture
def exit_codes(monkeypatch):
  """The exit codes with which this process would have exited."""
  codes = []

  def record(code):
    codes.append(code)
    raise Exited

  monkeypatch.setattr(os, '_exit', record)
  monkeypatch.setattr(processes, '_exit_lock', threading.Lock())
  monkeypatch.setattr(processes, '_GRACE_PERIOD', 0)
  monkeypatch.setattr(processes, '_GRACE_PERIOD_OF_PRIMARY', 0)
  return codes


@pytest.fixture
def no_scheduler(monkeypatch):
  """Remove every sign of a scheduler; to start JAX's service is an error."""
  for name in CLUSTERS:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(jax.distributed, 'initialize', None)


@pytest.mark.usefixtures('no_scheduler')
class TestSingleProcess:
  def test_host_without_a_scheduler_joins_nothing(self):
    processes.start()
    assert processes.is_primary()
    assert not processes.are_several()

  def test_num_processes_1_joins_nothing_on_a_cluster(self, monkeypatch):
    monkeypatch.setenv('SLURM_STEP_NODELIST', 'node[1-9]')
    processes.start(num_processes=1)

  def test_fail_and_finish_return(self):
    processes.fail('no other process gets this')
    processes.finish()

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
  def test_incomplete_arguments_are_refused(self, arguments):
    with pytest.raises(ValueError, match='need all of --coordinator'):
      processes.start(**arguments)

  @pytest.mark.parametrize('index', [-1, 2])
  def test_index_out_of_range_is_refused(self, index):
    with pytest.raises(ValueError, match=rf'process_id={index} is not in \[0'):
      processes.start('a:1', 2, index)

  @pytest.mark.parametrize('address', ['host0', 'host0:', ':1', 'host0:http'])
  def test_address_without_a_port_is_refused(self, address):
    with pytest.raises(ValueError, match='is not HOST:PORT'):
      processes.start(address, 2, 0)


def test_error_of_jax_while_joining_is_reported(monkeypatch, exit_codes, capfd):
  def initialize(*arguments, **options):
    raise RuntimeError('Kubernetes API Error: 403\nIt appears that ...')

  monkeypatch.setenv('JOB_COMPLETION_INDEX', '0')
  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  with pytest.raises(Exited):
    processes.start()
  assert exit_codes == [1]
  (line,) = capfd.readouterr().err.splitlines()
  assert 'cannot be joined (Kubernetes API Error: 403 It appears' in line


class TestClusters:
  @pytest.fixture
  def calls(self, monkeypatch):
    """The calls of `jax.distributed.initialize`, which detects nothing."""
    calls = []

    def initialize(*arguments, **options):
      calls.append((arguments, options))
      raise ValueError('coordinator_address should be defined.')

    for name in CLUSTERS:
      monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    return calls

  @pytest.mark.parametrize('variable', CLUSTERS)
  def test_undetected_job_of_a_scheduler_is_refused(
    self, calls, monkeypatch, variable
  ):
    monkeypatch.setenv(variable, '0')
    # Else every process would train separately, in one workdir.
    with pytest.raises(
      ValueError, match=f'{variable} is set by a job'
    ) as error:
      processes.start(timeout=70)
    is_kubernetes = variable == 'JOB_COMPLETION_INDEX'
    assert ('pip install kubernetes' in str(error.value)) == is_kubernetes
    assert '--process_id=I; or --num_processes=1' in str(error.value)
    ((arguments, options),) = calls
    assert arguments == (None, None, None)
    assert options['cluster_detection_method'] is None
    # JAX's timeouts are longer than ours.
    assert options['initialization_timeout'] > 70
    assert 70 < options['heartbeat_timeout_seconds'] < 200
    assert not processes.are_several()

  @pytest.mark.parametrize('platforms', ['cpu', 'tpu,cpu'])
  def test_tpu_vm_asks_jax_unless_it_computes_on_cpu(self, calls, platforms):
    before = jax.config.jax_platforms
    try:
      jax.config.update('jax_platforms', platforms)
      processes.start()
    finally:
      jax.config.update('jax_platforms', before)
    assert len(calls) == ('tpu' in platforms)

  def test_kubernetes_pod_without_an_index_joins_nothing(
    self, calls, monkeypatch
  ):
    monkeypatch.setenv('KUBERNETES_SERVICE_HOST', '10.0.0.1')
    processes.start()
    assert not calls

  def test_other_errors_are_not_hidden(self, calls):
    with pytest.raises(ValueError, match='coordinator_address'):
      processes.start('a:1', 2, 0)
    ((_, options),) = calls
    assert options['cluster_detection_method'] == 'deactivate'


def test_failure_ends_the_others_with_the_same_code(
  monkeypatch, exit_codes, capfd
):
  client = fake_processes.Client()
  fake_processes.join(monkeypatch, 1, client=client)
  with pytest.raises(Exited):
    processes.fail('the disk is full.', 2)
  first = fake_processes.join(monkeypatch, 0, client=client)
  monkeypatch.setattr(processes, '_exit_lock', threading.Lock())
  with pytest.raises(Exited):
    processes._HeartbeatMonitor(first, 60)._update(0)
  assert exit_codes == [2, 2]
  lines = capfd.readouterr().err.splitlines()
  assert lines == [
    'nfnet_jax: the disk is full.',
    'nfnet_jax: Process 1 ended the run: the disk is full.',
  ]


@pytest.mark.parametrize('error', [BrokenPipeError, ValueError('closed')])
def test_process_exits_even_if_its_output_is_closed(
  monkeypatch, exit_codes, error
):
  """Else it would hold the lock, and all later calls would wait forever."""

  class Closed:
    def write(self, text):
      raise error

    flush = lambda self: self.write('')

  monkeypatch.setattr(sys, 'stderr', Closed())
  monkeypatch.setattr(sys, 'stdout', Closed())
  with pytest.raises(Exited):
    processes._exit_process('nobody reads this.', 2)
  assert exit_codes == [2]


def test_exceeded_time_limit_ends_all_processes(monkeypatch, exit_codes, capfd):
  exited, client = threading.Event(), fake_processes.Client()
  fail_or_exit = processes._fail_or_exit

  def record(message):
    with pytest.raises(Exited):
      fail_or_exit(message)
    exited.set()

  monkeypatch.setattr(processes, '_fail_or_exit', record)
  fake_processes.join(monkeypatch, 1, client=client)
  with processes.exit_after(60, 'not printed.'):
    pass
  with processes.exit_after(0.01, 'The devices hang.'):
    assert exited.wait(60)
  assert exit_codes == [1]
  assert capfd.readouterr().err == 'nfnet_jax: The devices hang.\n'
  assert client.values['nfnet_jax/failures/1'] == '1 The devices hang.'


def test_missing_heartbeat_ends_the_run_after_the_timeout(
  monkeypatch, exit_codes, capfd
):
  clock = itertools.count(0, 10)
  monkeypatch.setattr(processes.time, 'monotonic', lambda: next(clock))
  process_group = fake_processes.join(monkeypatch, 0, count=3)
  monitor = processes._HeartbeatMonitor(process_group, 25)
  for number in range(5):  # Both send heartbeats.
    process_group.client.key_value_set(
      'nfnet_jax/heartbeats/1', str(number), True
    )
    process_group.client.key_value_set(
      'nfnet_jax/heartbeats/2', str(number), True
    )
    monitor._update(number)
  for number in range(5, 7):
    process_group.client.key_value_set(
      'nfnet_jax/heartbeats/1', str(number), True
    )
    monitor._update(number)
  assert not exit_codes
  with pytest.raises(Exited):
    monitor._update(7)
  assert exit_codes == [1]
  assert 'Process 2 of 3 has not answered for 25 s.' in capfd.readouterr().err


def test_error_caused_by_a_lost_process_is_explained():
  error = RuntimeError('Gloo all-reduce failed: closed by peer\nmore')
  line = processes.explain(error)
  assert line.startswith('Lost another process (RuntimeError: Gloo all-reduce')
  assert 'more' not in line.partition(')')[0]
  assert processes.explain(OSError(28, 'full')) == 'OSError: [Errno 28] full'


def test_polls_of_a_stop_are_numbered(monkeypatch):
  fake_processes.join(monkeypatch, 1)
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


def test_ctrl_c_in_one_process_stops_all(monkeypatch):
  fake_processes.join(monkeypatch, 1)
  sent = []
  with preemption.StopRequest():
    monkeypatch.setattr(os, 'kill', lambda *what: sent.append(what))
    signal.raise_signal(signal.SIGINT)
  assert sent == [(os.getpid(), signal.SIGTERM)]
