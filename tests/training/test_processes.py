"""Joining, agreeing and ending, without other processes."""

import itertools
import json
import os
import signal
import threading

import jax
import numpy as np
import pytest

from nfnet_jax.training import installation, interrupt, metrics, processes

CLUSTERS = (
  'SLURM_STEP_NODELIST',
  'OMPI_MCA_orte_hnp_uri',
  'JOB_COMPLETION_INDEX',
)


class Client:
  """JAX's store of keys, within this process."""

  def __init__(self):
    self.values = {}

  def key_value_set(self, key, value, allow_overwrite=False):
    assert allow_overwrite or key not in self.values
    self.values[key] = value

  def blocking_key_value_get(self, key, timeout_in_ms):
    assert timeout_in_ms > 0
    return self.values[key]

  def key_value_dir_get(self, prefix):
    return [
      (key, value)
      for key, value in self.values.items()
      if key.startswith(f'{prefix}/')
    ]


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


def join(monkeypatch, index, count=2, client=None):
  team = processes._Team(client or Client(), index, count)
  monkeypatch.setattr(processes, '_team', team)
  return team


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
    assert processes.from_primary(lambda: 3) == 3
    processes.agree({'a': 'b'})
    with processes.primary_first():
      pass
    tree = {'w': np.ones(3)}
    assert processes.broadcast(tree, None) is tree
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
    processes.start(timeout=70)
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


def test_facts_of_another_process_are_compared(monkeypatch):
  client = Client()
  join(monkeypatch, 0, client=client)
  processes.agree({'jax': '1', 'the code': 'x', 'old': 'y'})
  join(monkeypatch, 1, client=client)
  with pytest.raises(ValueError, match='Process 1 differs') as error:
    processes.agree({'jax': '2', 'the code': 'x', 'new': 'z'})
  for text in (
    'jax (1 there, 2 here)',
    'old (y there, None',
    'new (None there',
  ):
    assert text in str(error.value)
  assert 'the code' not in str(error.value)


def test_code_and_versions_are_told(monkeypatch):
  told = installation.describe()
  assert told['jax'] == jax.__version__
  assert len(told['the code']) == 12
  # The same wherever the package lies, and moved by any change to it.
  monkeypatch.setattr(installation.pathlib.Path, 'read_bytes', lambda _: b'')
  changed = installation.describe()
  assert changed.pop('the code') != told.pop('the code')
  assert changed == told


def test_every_exchange_has_a_key_of_its_own(monkeypatch):
  client = Client()
  join(monkeypatch, 0, client=client)
  assert [processes.from_primary(lambda n=n: n) for n in (1, 2)] == [1, 2]
  join(monkeypatch, 1, client=client)
  assert [processes.from_primary(pytest.fail) for _ in range(2)] == [1, 2]


def test_the_first_prepares_alone(monkeypatch):
  client, order = Client(), []
  join(monkeypatch, 0, client=client)
  with processes.primary_first():
    assert not client.values
    order.append(0)
  join(monkeypatch, 1, client=client)
  with processes.primary_first():
    order.append(1)
  assert order == [0, 1]
  join(monkeypatch, 1)
  with pytest.raises(KeyError), processes.primary_first():
    pytest.fail('It went ahead of the first.')


def test_broadcast_keeps_every_bit(monkeypatch):
  """Signs of zeros, NaNs, integers, scalars, empty leaves; piece by piece."""
  tree = {
    'w': np.array([-0.0, np.nan, np.inf, 1e-42], np.float32),
    'n': np.int32(-7),
    'none': np.zeros((0, 3), np.float32),
    'b': np.array([1, 2, 3], np.uint8),
  }
  sent = []

  def note(piece):
    sent.append(piece.copy())
    return piece

  monkeypatch.setattr(processes, '_CHUNK', 2)
  monkeypatch.setattr(processes.multihost_utils, 'broadcast_one_to_all', note)
  join(monkeypatch, 0)
  processes.broadcast(tree, tree)
  assert {len(piece) for piece in sent} == {2}
  replies = iter(sent)
  monkeypatch.setattr(
    processes.multihost_utils, 'broadcast_one_to_all', lambda _: next(replies)
  )
  join(monkeypatch, 1)
  like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
  received = processes.broadcast(None, like)
  for name, leaf in tree.items():
    assert received[name].dtype == leaf.dtype
    assert received[name].shape == leaf.shape
    assert received[name].tobytes() == leaf.tobytes()
    assert received[name].flags.writeable


def test_failing_tells_the_others_which_end_alike(monkeypatch, ends, capfd):
  client = Client()
  join(monkeypatch, 1, client=client)
  with pytest.raises(Ended):
    processes.fail('the disk is full.', 2)
  first = join(monkeypatch, 0, client=client)
  monkeypatch.setattr(processes, '_ending', threading.Lock())
  with pytest.raises(Ended):
    processes._Watch(first, 60)._look(0)
  assert ends == [2, 2]
  lines = capfd.readouterr().err.splitlines()
  assert lines == [
    'nfnet_jax: the disk is full.',
    'nfnet_jax: Process 1 ended all: the disk is full.',
  ]


def test_a_silent_process_is_noticed_in_time(monkeypatch, ends, capfd):
  clock = itertools.count(0, 10)
  monkeypatch.setattr(processes.time, 'monotonic', lambda: next(clock))
  team = join(monkeypatch, 0, count=3)
  watch = processes._Watch(team, 25)
  for beat in range(5):  # Both beat.
    team.client.key_value_set('nfnet_jax/beats/1', str(beat), True)
    team.client.key_value_set('nfnet_jax/beats/2', str(beat), True)
    watch._look(beat)
  for beat in range(5, 7):
    team.client.key_value_set('nfnet_jax/beats/1', str(beat), True)
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


def test_json_keeps_what_metrics_hold(monkeypatch):
  join(monkeypatch, 0)
  row = {'step': 3, 'eval/loss': float('nan')}
  assert json.dumps(processes.from_primary(lambda: row)) == json.dumps(row)


def test_a_stop_is_polled_by_one_counter_that_goes_on(monkeypatch):
  join(monkeypatch, 1)
  polls = []
  monkeypatch.setattr(
    interrupt.multihost_utils,
    'reached_preemption_sync_point',
    lambda poll: polls.append(poll) or poll == 3,
  )
  before = signal.getsignal(signal.SIGTERM)
  with interrupt.StopRequest() as stop:
    assert signal.getsignal(signal.SIGTERM) is before  # JAX's own.
    assert [stop.poll() for _ in range(4)] == [False, False, True, False]
  assert polls == [1, 2, 3, 4]


def test_ctrl_c_in_one_process_stops_all(monkeypatch):
  join(monkeypatch, 1)
  sent = []
  with interrupt.StopRequest():
    monkeypatch.setattr(os, 'kill', lambda *what: sent.append(what))
    signal.raise_signal(signal.SIGINT)
  assert sent == [(os.getpid(), signal.SIGTERM)]


def test_others_write_no_metrics_but_know_the_evaluations(
  monkeypatch, tmp_path
):
  client, row = Client(), {'step': 4, 'eval/top1': 0.5}
  (tmp_path / 'a').mkdir()
  join(monkeypatch, 0, client=client)
  with metrics.MetricsWriter(tmp_path / 'a', 0) as writer:
    writer.write([row, {'step': 5, 'loss': 1.0}, {'step': 9, 'eval/top1': 1}])
  client.values.clear()
  join(monkeypatch, 0, client=client)
  with metrics.MetricsWriter(tmp_path / 'a', 5) as writer:
    assert writer.evaluations == {4: row}
  join(monkeypatch, 1, client=client)
  with metrics.MetricsWriter(tmp_path / 'b', 5) as writer:
    assert writer.evaluations == {4: row}
    writer.write([{'step': 6, 'eval/top1': 1.0}])
    assert set(writer.evaluations) == {4, 6}
  assert not (tmp_path / 'b').exists()


@pytest.mark.parametrize('votes', [(True, True), (True, False), (False, True)])
def test_everywhere_means_in_every_process(monkeypatch, votes):
  client = Client()
  for index in (1, 0):
    join(monkeypatch, index, client=client)
    key = f'nfnet_jax/votes/0/{1 - index}'
    client.values.setdefault(key, str(votes[1 - index]))
    client.values.pop(f'nfnet_jax/votes/0/{index}', None)
    assert processes.everywhere(votes[index]) == all(votes)
