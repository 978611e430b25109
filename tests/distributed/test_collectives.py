"""What processes tell one another, without other processes."""

import json
import sys

import jax
import numpy as np
import pytest

from nfnet_jax.distributed import collectives, environment, processes
from nfnet_jax.training import metrics


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


def join(monkeypatch, index, count=2, client=None):
  process_group = processes.ProcessGroup(client or Client(), index, count)
  monkeypatch.setattr(processes, '_process_group', process_group)
  return process_group


def test_a_process_alone_hears_itself():
  assert collectives.from_primary(lambda: 3) == 3
  assert collectives.all_true(True)
  collectives.assert_equal({'a': 'b'})
  with collectives.primary_first():
    pass
  tree = {'w': np.ones(3)}
  assert collectives.broadcast(tree, None) is tree


def test_facts_of_another_process_are_compared(monkeypatch):
  client, waited = Client(), []
  monkeypatch.setattr(processes, 'await_failure', lambda: waited.append(0))
  join(monkeypatch, 0, client=client)
  client.values['nfnet_jax/votes/1/1'] = 'False'
  collectives.assert_equal({'jax': '1', 'the code': 'x', 'old': 'y'})
  assert waited
  del client.values['nfnet_jax/votes/1/1']
  join(monkeypatch, 1, client=client)
  with pytest.raises(ValueError, match='Process 1 differs') as error:
    collectives.assert_equal({'jax': '2', 'the code': 'x', 'new': 'z'})
  for text in (
    'jax (1 there, 2 here)',
    'old (y there, None',
    'new (None there',
  ):
    assert text in str(error.value)
  assert 'the code' not in str(error.value)


def test_code_and_versions_are_told(monkeypatch):
  told = environment.describe()
  assert told['jax'] == jax.__version__
  assert len(told['the code']) == 12
  assert {'tensorstore', 'jaxlib', 'libtpu'} <= set(told)
  # The same wherever the package lies, and moved by any change to it.
  monkeypatch.setattr(environment.pathlib.Path, 'read_bytes', lambda _: b'')
  changed = environment.describe()
  assert changed.pop('the code') != told.pop('the code')
  assert changed == told


def test_plugins_are_told_by_the_kind_of_their_names(tmp_path, monkeypatch):
  for folder, name in [
    ('first', 'nvidia_cudnn.cu12-9.1'),
    ('first', 'jax_cuda12_plugin-0.10'),
    ('then', 'NVIDIA-cudnn-cu12-8.0'),
    ('then', 'ajax-1.0'),
  ]:
    path = tmp_path / folder / f'{name}.dist-info'
    path.mkdir(parents=True)
    name, version = name.rsplit('-', 1)
    (path / 'METADATA').write_text(f'Name: {name}\nVersion: {version}\n')
  monkeypatch.setattr(sys, 'path', [f'{tmp_path}/first', f'{tmp_path}/then'])
  told = environment.describe()
  assert told['nvidia-cudnn-cu12'] == '9.1'
  assert told['jax-cuda12-plugin'] == '0.10'
  assert told['optax'] == 'none'
  assert 'ajax' not in told


def test_every_exchange_has_a_key_of_its_own(monkeypatch):
  client = Client()
  join(monkeypatch, 0, client=client)
  assert [collectives.from_primary(lambda n=n: n) for n in (1, 2)] == [1, 2]
  join(monkeypatch, 1, client=client)
  assert [collectives.from_primary(pytest.fail) for _ in range(2)] == [1, 2]


def test_the_first_prepares_alone(monkeypatch):
  client, order = Client(), []
  join(monkeypatch, 0, client=client)
  with collectives.primary_first():
    assert not client.values
    order.append(0)
  join(monkeypatch, 1, client=client)
  with collectives.primary_first():
    order.append(1)
  assert order == [0, 1]
  join(monkeypatch, 1)
  with pytest.raises(KeyError), collectives.primary_first():
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

  monkeypatch.setattr(collectives, '_CHUNK', 2)
  monkeypatch.setattr(collectives.multihost_utils, 'broadcast_one_to_all', note)
  join(monkeypatch, 0)
  collectives.broadcast(tree, tree)
  assert {len(piece) for piece in sent} == {2}
  replies = iter(sent)
  monkeypatch.setattr(
    collectives.multihost_utils, 'broadcast_one_to_all', lambda _: next(replies)
  )
  join(monkeypatch, 1)
  like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
  received = collectives.broadcast(None, like)
  for name, leaf in tree.items():
    assert received[name].dtype == leaf.dtype
    assert received[name].shape == leaf.shape
    assert received[name].tobytes() == leaf.tobytes()
    assert received[name].flags.writeable


def test_json_keeps_what_metrics_hold(monkeypatch):
  join(monkeypatch, 0)
  row = {'step': 3, 'eval/loss': float('nan')}
  assert json.dumps(collectives.from_primary(lambda: row)) == json.dumps(row)


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
    assert collectives.all_true(votes[index]) == all(votes)
