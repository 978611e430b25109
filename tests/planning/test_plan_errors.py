"""Errors of libtpu and the compiler, each in one line."""

import importlib.util

import pytest

from nfnet_jax.planning import plan_errors, topology


def test_missing_libtpu(monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name, *rest: None if name == 'libtpu' else find(name, *rest),
  )
  with pytest.raises(plan_errors.PlanError, match=r"pip install '.\[plan"):
    topology.get_pod('v3:2x2')


@pytest.fixture
def libtpu(monkeypatch):
  """Return a function that makes an installed libtpu fail with a message."""
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())

  def fail(text):
    with plan_errors.translate_libtpu_errors('v3:3x3'):
      raise RuntimeError(text)

  return fail


@pytest.mark.parametrize(
  'message',
  [
    'ABORTED: Internal error when accessing libtpu multi-process lockfile. '
    'Run "$ sudo rm /tmp/libtpu_lockfile".',
    'The TPU is already in use by process with pid 17.',
  ],
)
def test_locked_libtpu(libtpu, message):
  with pytest.raises(plan_errors.PlanError) as caught:
    libtpu(message)
  text = str(caught.value)
  assert text.startswith('Another process holds libtpu')
  assert 'ALLOW_MULTIPLE_LIBTPU_LOAD=1' in text
  assert '\n' not in text


def test_a_topology_that_libtpu_rejects(libtpu):
  with pytest.raises(
    plan_errors.PlanError, match="'v3:3x3': INVALID is not div"
  ):
    libtpu('INVALID\n  is not divisible')


@pytest.mark.parametrize(
  ('name', 'hint'),
  [
    ('v3', 'such as v2:4x4'),
    ('v3:8', 'GENERATION:LAYOUT'),
    ('v3:8x8:', 'GENERATION:LAYOUT'),
    ('v5:2x2', "Did you mean 'v5p:2x2'?"),
    ('tpu:2x2', 'Known: v2, v3, v4, v5e, v5p, v6e, tpu7x.'),
  ],
)
def test_unknown_topologies(name, hint):
  with pytest.raises(plan_errors.PlanError) as caught:
    topology.parse(name)
  assert name in str(caught.value)
  assert hint in str(caught.value)


@pytest.mark.parametrize(
  ('message', 'sizes'),
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
      'for HLO temporaries (422.67G) exceeds available HBM (15.48G).',
      (422.67, 15.48),
    ),
    (
      'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.25G '
      'of 15.48G hbm. Exceeded hbm capacity by 4.77G.',
      (20.25, 15.48),
    ),
    ('Used 512.00M of 7.48G hbm', (0.5, 7.48)),
  ],
)
def test_sizes_in_the_message_of_a_too_large_program(message, sizes):
  needed, available = plan_errors.read_shortage(message)
  assert needed == pytest.approx(sizes[0] * 2**30, abs=2)
  assert available == pytest.approx(sizes[1] * 2**30, abs=2)


def test_other_compiler_errors_are_not_about_memory():
  assert plan_errors.read_shortage('INTERNAL: something else') is None
