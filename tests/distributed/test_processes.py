"""Joining, agreeing and ending, without other processes."""

import itertools
import os
import signal
import sys
import threading

import jax
import pytest

from nfnet_jax.distributed import preemption, processes
from tests.distributed import test_collectives

CLUSTERS = (
  'SLURM_STEP_NODELIST',
  'OMPI_MCA_orte_hnp_uri',
  'JOB_COMPLETION_INDEX',
)


class Ended(BaseException):
  """Stands for the end of the process, which the tests survive."""


@pytest.fixture
def ends(monkeypatch):
  """The exit codes with which this process would have ended."""
  codes = []

  def leave(code):
    codes.append(code)
    raise Ended

  monkeypatch.setattr(os, '_exit', leave)
  monkeypatch.setattr(processes, '_ending', threading.Lock())
  monkeypatch.setattr(processes, '_LINGER', 0)
  monkeypatch.setattr(processes, '_LINGER_OF_PRIMARY', 0)
  return codes


@pytest.fixture
def alone(monkeypatch):
  """A machine without a scheduler; starting anything is an error."""
  for name in CLUSTERS:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(jax.distributed, 'initialize', None)


@pytest.mark.usefixtures('alone')
class TestAlone:
  def test_a_plain_host_starts_nothing(self):
    processes.start()
    assert processes.is_primary()
    assert not processes.are_several()

  def test_one_process_is_alone_in_any_cluster(self, monkeypatch):
    monkeypatch.setenv('SLURM_STEP_NODELIST', 'node[1-9]')
    processes.start(num_processes=1)

  def test_functions_do_the_obvious(self):
    processes.fail('not taken up by anyone')
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
  def test_half_an_address_is_refused(self, arguments):
    with pytest.raises(ValueError, match='need all of --coordinator'):
      processes.start(**arguments)

  @pytest.mark.parametrize('index', [-1, 2])
  def test_an_index_out_of_range_is_refused(self, index):
    with pytest.raises(ValueError, match=rf'process_id={index} is not in \[0'):
      processes.start('a:1', 2, index)

  @pytest.mark.parametrize('place', ['host0', 'host0:', ':1', 'host0:http'])
  def test_a_place_without_a_port_is_refused(self, place):
    with pytest.raises(ValueError, match='is not HOST:PORT'):
      processes.start(place, 2, 0)


def test_what_jax_raises_while_joining_is_said(monkeypatch, ends, capfd):
  def initialize(*arguments, **options):
    raise RuntimeError('Kubernetes API Error: 403\nIt appears that ...')

  monkeypatch.setenv('JOB_COMPLETION_INDEX', '0')
  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  with pytest.raises(Ended):
    processes.start()
  assert ends == [1]
  (line,) = capfd.readouterr().err.splitlines()
  assert 'cannot be joined (Kubernetes API Error: 403 It appears' in line


class TestClusters:
  @pytest.fixture
  def asked(self, monkeypatch):
    """How JAX was asked to start, which finds nothing."""
    calls = []

    def initialize(*arguments, **options):
      calls.append((arguments, options))
      raise ValueError('coordinator_address should be defined.')

    for name in CLUSTERS:
      monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    return calls

  @pytest.mark.parametrize('sign', CLUSTERS)
  def test_jax_is_asked_where_a_scheduler_is(self, asked, monkeypatch, sign):
    monkeypatch.setenv(sign, '0')
    # All would train alone, in one workdir, if it were silent.
    with pytest.raises(ValueError, match=f'{sign} tells of a job') as error:
      processes.start(timeout=70)
    is_kubernetes = sign == 'JOB_COMPLETION_INDEX'
    assert ('pip install kubernetes' in str(error.value)) == is_kubernetes
    assert '--process_id=I; or --num_processes=1' in str(error.value)
    ((arguments, options),) = asked
    assert arguments == (None, None, None)
    assert options['cluster_detection_method'] is None
    # The longest silence, and what JAX grants beyond it.
    assert options['initialization_timeout'] > 70
    assert 70 < options['heartbeat_timeout_seconds'] < 200
    assert not processes.are_several()

  @pytest.mark.parametrize('platforms', ['cpu', 'tpu,cpu'])
  def test_a_tpu_vm_is_asked_unless_it_computes_on_cpu(self, asked, platforms):
    before = jax.config.jax_platforms
    try:
      jax.config.update('jax_platforms', platforms)
      processes.start()
    finally:
      jax.config.update('jax_platforms', before)
    assert len(asked) == ('tpu' in platforms)

  def test_an_ordinary_pod_of_kubernetes_is_alone(self, asked, monkeypatch):
    monkeypatch.setenv('KUBERNETES_SERVICE_HOST', '10.0.0.1')
    processes.start()
    assert not asked

  def test_other_errors_are_not_hidden(self, asked, monkeypatch):
    with pytest.raises(ValueError, match='coordinator_address'):
      processes.start('a:1', 2, 0)
    ((_, options),) = asked
    assert options['cluster_detection_method'] == 'deactivate'


def test_failing_tells_the_others_which_end_alike(monkeypatch, ends, capfd):
  client = test_collectives.Client()
  test_collectives.join(monkeypatch, 1, client=client)
  with pytest.raises(Ended):
    processes.fail('the disk is full.', 2)
  first = test_collectives.join(monkeypatch, 0, client=client)
  monkeypatch.setattr(processes, '_ending', threading.Lock())
  with pytest.raises(Ended):
    processes._Watch(first, 60)._look(0)
  assert ends == [2, 2]
  lines = capfd.readouterr().err.splitlines()
  assert lines == [
    'nfnet_jax: the disk is full.',
    'nfnet_jax: Process 1 ended all: the disk is full.',
  ]


@pytest.mark.parametrize('error', [BrokenPipeError, ValueError('closed')])
def test_it_ends_even_where_nobody_reads(monkeypatch, ends, error):
  """Else it would hold the lock, and all that follow would wait for ever."""

  class Closed:
    def write(self, text):
      raise error

    flush = lambda self: self.write('')

  monkeypatch.setattr(sys, 'stderr', Closed())
  monkeypatch.setattr(sys, 'stdout', Closed())
  with pytest.raises(Ended):
    processes._end('nobody reads this.', 2)
  assert ends == [2]


def test_what_takes_too_long_ends_all(monkeypatch, ends, capfd):
  late, client = threading.Event(), test_collectives.Client()
  give_up = processes._give_up

  def note(line):
    with pytest.raises(Ended):
      give_up(line)
    late.set()

  monkeypatch.setattr(processes, '_give_up', note)
  test_collectives.join(monkeypatch, 1, client=client)
  with processes.at_most(60, 'not said.'):
    pass
  with processes.at_most(0.01, 'The devices hang.'):
    assert late.wait(60)
  assert ends == [1]
  assert capfd.readouterr().err == 'nfnet_jax: The devices hang.\n'
  assert client.values['nfnet_jax/failures/1'] == '1 The devices hang.'


def test_a_silent_process_is_noticed_in_time(monkeypatch, ends, capfd):
  clock = itertools.count(0, 10)
  monkeypatch.setattr(processes.time, 'monotonic', lambda: next(clock))
  process_group = test_collectives.join(monkeypatch, 0, count=3)
  watch = processes._Watch(process_group, 25)
  for beat in range(5):  # Both beat.
    process_group.client.key_value_set('nfnet_jax/beats/1', str(beat), True)
    process_group.client.key_value_set('nfnet_jax/beats/2', str(beat), True)
    watch._look(beat)
  for beat in range(5, 7):
    process_group.client.key_value_set('nfnet_jax/beats/1', str(beat), True)
    watch._look(beat)
  assert not ends
  with pytest.raises(Ended):
    watch._look(7)
  assert ends == [1]
  assert 'Process 2 of 3 has not answered for 25 s.' in capfd.readouterr().err


def test_what_another_process_caused_is_said_so():
  error = RuntimeError('Gloo all-reduce failed: closed by peer\nmore')
  line = processes.explain(error)
  assert line.startswith('Lost another process (RuntimeError: Gloo all-reduce')
  assert 'more' not in line.partition(')')[0]
  assert processes.explain(OSError(28, 'full')) == 'OSError: [Errno 28] full'


def test_a_stop_is_polled_by_one_counter_that_goes_on(monkeypatch):
  test_collectives.join(monkeypatch, 1)
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
  test_collectives.join(monkeypatch, 1)
  sent = []
  with preemption.StopRequest():
    monkeypatch.setattr(os, 'kill', lambda *what: sent.append(what))
    signal.raise_signal(signal.SIGINT)
  assert sent == [(os.getpid(), signal.SIGTERM)]
