"""Tests of the exchange between processes, with a fake key-value store."""

import json
import sys

import jax
import numpy as np
import pytest

from nfnet_jax.distributed import collectives, environment, processes
from nfnet_jax.training import metrics
from tests.distributed import fake_processes


def test_single_process_gets_its_own_values():
  assert collectives.from_primary(lambda: 3) == 3
  assert collectives.all_true(True)
  collectives.assert_equal({'a': 'b'})
  with collectives.primary_first():
    pass
  tree = {'w': np.ones(3)}
  assert collectives.broadcast(tree, None) is tree


def test_facts_are_compared_with_those_of_process_0(monkeypatch):
  client, waited = fake_processes.Client(), []
  monkeypatch.setattr(processes, 'await_failure', lambda: waited.append(0))
  fake_processes.join(monkeypatch, 0, client=client)
  client.values['nfnet_jax/votes/1/1'] = 'False'
  collectives.assert_equal({'jax': '1', 'the code': 'x', 'old': 'y'})
  assert waited
  del client.values['nfnet_jax/votes/1/1']
  fake_processes.join(monkeypatch, 1, client=client)
  with pytest.raises(ValueError, match='Process 1 differs') as error:
    collectives.assert_equal({'jax': '2', 'the code': 'x', 'new': 'z'})
  for text in (
    'jax (1 there, 2 here)',
    'old (y there, None',
    'new (None there',
  ):
    assert text in str(error.value)
  assert 'the code' not in str(error.value)


def test_code_and_versions_are_described(monkeypatch):
  described = environment.describe()
  assert described['jax'] == jax.__version__
  assert len(described['the code']) == 12
  assert {'tensorstore', 'jaxlib', 'libtpu'} <= set(described)
  # The digest depends on the contents of the files, not on their location.
  monkeypatch.setattr(environment.pathlib.Path, 'read_bytes', lambda _: b'')
  changed = environment.describe()
  assert changed.pop('the code') != described.pop('the code')
  assert changed == described


def test_plugins_are_found_by_prefix(tmp_path, monkeypatch):
  for folder, name in [
    ('first', 'nvidia_cudnn.cu12-9.1'),
    ('first', 'jax_cuda12_plugin-0.10'),
    ('second', 'NVIDIA-cudnn-cu12-8.0'),
    ('second', 'ajax-1.0'),
  ]:
    path = tmp_path / folder / f'{name}.dist-info'
    path.mkdir(parents=True)
    name, version = name.rsplit('-', 1)
    (path / 'METADATA').write_text(f'Name: {name}\nVersion: {version}\n')
  monkeypatch.setattr(sys, 'path', [f'{tmp_path}/first', f'{tmp_path}/second'])
  described = environment.describe()
  assert described['nvidia-cudnn-cu12'] == '9.1'
  assert described['jax-cuda12-plugin'] == '0.10'
  assert described['optax'] == 'none'
  assert 'ajax' not in described


def test_every_exchange_has_its_own_key(monkeypatch):
  client = fake_processes.Client()
  fake_processes.join(monkeypatch, 0, client=client)
  assert [collectives.from_primary(lambda n=n: n) for n in (1, 2)] == [1, 2]
  fake_processes.join(monkeypatch, 1, client=client)
  assert [collectives.from_primary(pytest.fail) for _ in range(2)] == [1, 2]


def test_process_0_runs_first(monkeypatch):
  client, order = fake_processes.Client(), []
  fake_processes.join(monkeypatch, 0, client=client)
  with collectives.primary_first():
    assert not client.values
    order.append(0)
  fake_processes.join(monkeypatch, 1, client=client)
  with collectives.primary_first():
    order.append(1)
  assert order == [0, 1]
  fake_processes.join(monkeypatch, 1)
  with pytest.raises(KeyError), collectives.primary_first():
    pytest.fail('It did not wait for process 0.')


def test_broadcast_keeps_every_bit(monkeypatch):
  """Send signed zeros, NaNs, integers, scalars and empty leaves in chunks."""
  tree = {
    'w': np.array([-0.0, np.nan, np.inf, 1e-42], np.float32),
    'n': np.int32(-7),
    'none': np.zeros((0, 3), np.float32),
    'b': np.array([1, 2, 3], np.uint8),
  }
  sent = []

  def record(piece):
    sent.append(piece.copy())
    return piece

  monkeypatch.setattr(collectives, '_CHUNK', 2)
  monkeypatch.setattr(
    collectives.multihost_utils, 'broadcast_one_to_all', record
  )
  fake_processes.join(monkeypatch, 0)
  collectives.broadcast(tree, tree)
  assert {len(piece) for piece in sent} == {2}
  replies = iter(sent)
  monkeypatch.setattr(
    collectives.multihost_utils, 'broadcast_one_to_all', lambda _: next(replies)
  )
  fake_processes.join(monkeypatch, 1)
  template = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree
  )
  received = collectives.broadcast(None, template)
  for name, leaf in tree.items():
    assert received[name].dtype == leaf.dtype
    assert received[name].shape == leaf.shape
    assert received[name].tobytes() == leaf.tobytes()
    assert received[name].flags.writeable


def test_json_keeps_the_values_of_metrics(monkeypatch):
  fake_processes.join(monkeypatch, 0)
  row = {'step': 3, 'eval/loss': float('nan')}
  assert json.dumps(collectives.from_primary(lambda: row)) == json.dumps(row)


def test_only_process_0_writes_metrics_and_all_know_the_evaluations(
  monkeypatch, tmp_path
):
  client, row = fake_processes.Client(), {'step': 4, 'eval/top1': 0.5}
  (tmp_path / 'a').mkdir()
  fake_processes.join(monkeypatch, 0, client=client)
  with metrics.MetricsWriter(tmp_path / 'a', 0) as writer:
    writer.write([row, {'step': 5, 'loss': 1.0}, {'step': 9, 'eval/top1': 1}])
  client.values.clear()
  fake_processes.join(monkeypatch, 0, client=client)
  with metrics.MetricsWriter(tmp_path / 'a', 5) as writer:
    assert writer.evaluations == {4: row}
  fake_processes.join(monkeypatch, 1, client=client)
  with metrics.MetricsWriter(tmp_path / 'b', 5) as writer:
    assert writer.evaluations == {4: row}
    writer.write([{'step': 6, 'eval/top1': 1.0}])
    assert set(writer.evaluations) == {4, 6}
  assert not (tmp_path / 'b').exists()


@pytest.mark.parametrize('votes', [(True, True), (True, False), (False, True)])
def test_all_true_needs_every_process(monkeypatch, votes):
  client = fake_processes.Client()
  for index in (1, 0):
    fake_processes.join(monkeypatch, index, client=client)
    key = f'nfnet_jax/votes/0/{1 - index}'
    client.values.setdefault(key, str(votes[1 - index]))
    client.values.pop(f'nfnet_jax/votes/0/{index}', None)
    assert collectives.all_true(votes[index]) == all(votes)
