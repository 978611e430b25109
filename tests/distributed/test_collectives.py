"""Tests of the exchange between processes, which are threads here."""

import json
import sys

import jax
import numpy as np
import pytest

from nfnet_jax import errors
from nfnet_jax.distributed import collectives, environment
from nfnet_jax.training import metrics
from tests.distributed import fake_processes


def test_single_process_gets_its_own_values():
  assert collectives.from_primary(lambda: 3) == 3
  assert collectives.all_gather(True) == [True]
  collectives.assert_equal({'a': 'b'})
  with collectives.primary_first():
    pass
  tree = {'w': np.ones(3)}
  assert collectives.broadcast(tree, None) is tree


def assert_raised(errors, *expected):
  """Check the type and the text of the error that each process raised."""
  assert [(type(error), str(error)) for error in errors] == list(expected)


def test_all_gather_returns_the_values_of_all_in_order(monkeypatch):
  values = [{'loss': float('nan')}, 'x' * 1000, None, [1, 2]]
  results = fake_processes.run(
    monkeypatch,
    *(lambda v=value: collectives.all_gather(v) for value in values),
  )
  assert [json.dumps(r) for r in results] == [json.dumps(values)] * 4


def test_all_get_the_value_of_process_0(monkeypatch):
  results = fake_processes.run(
    monkeypatch,
    lambda: collectives.from_primary(lambda: {'a': 1}),
    lambda: collectives.from_primary(pytest.fail),
  )
  assert results == [{'a': 1}] * 2


@pytest.mark.parametrize(
  ('error', 'received'),
  [
    (errors.InputError('no config.'), errors.InputError('no config.')),
    (errors.RunError('no space.'), errors.RunError('no space.')),
    (OSError(28, 'full'), errors.RunError('OSError: [Errno 28] full')),
  ],
)
def test_an_error_of_one_process_is_raised_in_all(monkeypatch, error, received):
  others = [lambda: collectives.raise_together(None)] * 2
  results = fake_processes.run(
    monkeypatch,
    others[0],
    lambda: collectives.raise_together(error),
    others[1],
  )
  assert results[1] is error
  text = type(received), str(received)
  assert_raised([results[0], results[2]], text, text)


def test_the_first_of_several_errors_is_raised_in_all(monkeypatch):
  def fail(text):
    with collectives.failing_together():
      if text:
        raise errors.RunError(text)

  results = fake_processes.run(
    monkeypatch, *(lambda t=text: fail(t) for text in ('', 'one.', 'two.'))
  )
  assert_raised(results, *[(errors.RunError, 'one.')] * 3)


def test_facts_are_compared_with_those_of_process_0(monkeypatch):
  facts = [
    {'jax': '1', 'the code': 'x', 'old': 'y'},
    {'jax': '1', 'the code': 'x', 'old': 'y'},
    {'jax': '2', 'the code': 'x', 'new': 'z'},
  ]
  results = fake_processes.run(
    monkeypatch, *(lambda f=f: collectives.assert_equal(f) for f in facts)
  )
  for error in results:
    assert isinstance(error, errors.InputError)
    assert (
      'Process 2 differs from process 0 in jax (2 instead of 1), '
      'new (z instead of None), old (None instead of y). '
    ) in str(error)
  same = [lambda: collectives.assert_equal(facts[0])] * 2
  assert fake_processes.run(monkeypatch, *same) == [None, None]


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
  assert 'optax' not in described
  assert 'ajax' not in described


def test_process_0_runs_first(monkeypatch):
  order = []

  def work():
    with collectives.primary_first():
      order.append(jax.process_index())

  fake_processes.run(monkeypatch, work, work)
  assert order == [0, 1]


@pytest.mark.parametrize('bad', [0, 1])
def test_failure_in_turn_is_raised_in_all(monkeypatch, bad):
  def work():
    with collectives.primary_first():
      if jax.process_index() == bad:
        raise errors.InputError('no data.')

  results = fake_processes.run(monkeypatch, work, work)
  assert_raised(results, *[(errors.InputError, 'no data.')] * 2)


def test_broadcast_keeps_every_bit(monkeypatch):
  """Send signed zeros, NaNs, integers, scalars and empty leaves in chunks."""
  tree = {
    'w': np.array([-0.0, np.nan, np.inf, 1e-42], np.float32),
    'n': np.int32(-7),
    'none': np.zeros((0, 3), np.float32),
    'b': np.array([1, 2, 3], np.uint8),
  }
  template = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree
  )
  monkeypatch.setattr(collectives, '_CHUNK', 2)
  first, second = fake_processes.run(
    monkeypatch,
    lambda: collectives.broadcast(tree, template),
    lambda: collectives.broadcast(None, template),
  )
  for name, leaf in tree.items():
    for received in first[name], second[name]:
      assert received.dtype == leaf.dtype
      assert received.shape == leaf.shape
      assert received.tobytes() == leaf.tobytes()
      assert received.flags.writeable


def test_only_process_0_writes_metrics_and_all_know_the_evaluations(
  monkeypatch, tmp_path
):
  row = {'step': 4, 'eval/top1': 0.5}
  (tmp_path / '0').mkdir()
  with metrics.MetricsWriter(tmp_path / '0', 0) as writer:
    writer.write([row, {'step': 5, 'loss': 1.0}, {'step': 9, 'eval/top1': 1}])

  def resume():
    folder = tmp_path / str(jax.process_index())
    with metrics.MetricsWriter(folder, resumed_step=5) as writer:
      resumed = dict(writer.evaluations)
      writer.write([{'step': 6, 'eval/top1': 1.0}])
      return resumed, set(writer.evaluations)

  for resumed, later in fake_processes.run(monkeypatch, resume, resume):
    assert resumed == {4: row}
    assert later == {4, 6}
  assert not (tmp_path / '1').exists()
