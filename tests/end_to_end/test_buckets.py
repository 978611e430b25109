"""Runs whose workdir is in a bucket, served by `tests.buckets`."""

import contextlib
import json
import signal
import sys

from etils import epath
from google.api_core import exceptions
from google.cloud import storage
import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from nfnet_jax.experiments import evaluate, train
from nfnet_jax.storage import files
from nfnet_jax.training import checkpoint, metrics
from nfnet_jax.weights import load, network, save
from tests import trained_weights
from tests.end_to_end import linear, process_groups

FIELDS = 'step', 'params', 'model_state', 'opt_state', 'ema_params'


@pytest.fixture(autouse=True)
def bucket(buckets):
  """The objects of the bucket 'runs'."""
  return buckets.objects.setdefault('runs', {})


@pytest.fixture(scope='module')
def recipe(small):
  return [*small, '--config.run.log_every=1 step']


def rows_of(workdir):
  text = (epath.Path(workdir) / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def values_of(events):
  """Read TensorBoard's records as (step, name) -> value."""
  values = {}
  while events:  # A record is length, checksum, event, checksum.
    size = int.from_bytes(events[:8], 'little')
    event = event_pb2.Event.FromString(events[12 : 12 + size])
    values |= {(event.step, v.tag): v.simple_value for v in event.summary.value}
    events = events[16 + size :]
  return values


def states_of(workdir):
  directory = epath.Path(workdir) / 'checkpoints'
  with checkpoint.Checkpoints(directory, read_only=True) as checkpoints:
    return {
      step: jax.tree.leaves(checkpoints.restore_fields(FIELDS, step))
      for step in checkpoints.steps()
    }


def assert_same_run(workdir, other):
  assert rows_of(workdir) == rows_of(other)
  states, others = states_of(workdir), states_of(other)
  assert states.keys() == others.keys()
  for step, leaves in states.items():
    assert len(leaves) > 4
    for leaf, expected in zip(leaves, others[step], strict=True):
      np.testing.assert_array_equal(leaf, expected)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('run')


def train_linear(run_command, workdir):
  """Train a linear network as the command does, in a second."""
  return run_command(linear.main, f'--workdir={workdir}')


@pytest.fixture
def local_linear(run_command, folder):
  """The linear run on a disk, without faults, for comparison."""
  workdir = folder / 'linear'
  if not workdir.exists():
    code, _, err = train_linear(run_command, workdir)
    assert code == 0, err
  return workdir


class TestLinearRun:
  """One run in the bucket; its tests depend on their order."""

  def test_equals_the_run_on_a_disk(
    self, run_command, local_linear, buckets, bucket
  ):
    buckets.requests.clear()
    code, _, err = train_linear(run_command, 'gs://runs/linear')
    assert code == 0, err
    assert 'gs://runs/linear/curves.png' in err
    names = [n.split('/')[1] for n in bucket if n.startswith('linear/')]
    assert set(names) - {''} == {path.name for path in local_linear.iterdir()}
    assert bucket['linear/curves.png'].startswith(b'\x89PNG')
    assert not list(epath.Path('gs://runs/linear').glob('*.tmp'))
    assert_same_run('gs://runs/linear', local_linear)

  def test_metrics_are_uploaded_before_each_checkpoint(self, buckets):
    written = [name for method, name in buckets.requests if method != 'GET']
    uploads = [i for i, n in enumerate(written) if n == 'linear/metrics.jsonl']
    firsts = [-1]
    for step in (3, 6, 9, 12):
      prefix = f'linear/checkpoints/{step}/'
      firsts.append(
        next(i for i, n in enumerate(written) if n.startswith(prefix))
      )
      assert any(firsts[-2] < upload < firsts[-1] for upload in uploads)

  def test_events_are_complete(self, local_linear, bucket):
    folder = 'linear/tensorboard/events'
    parts = sorted(name for name in bucket if name.startswith(folder))
    (path,) = (local_linear / 'tensorboard').iterdir()
    expected = values_of(path.read_bytes())
    assert len(expected) > 30
    uploaded = values_of(b''.join(bucket[name] for name in parts))
    assert uploaded.keys() == expected.keys()
    timed = 'images_per_second', 'data_wait', 'goodput', 'time/'
    for key in expected:
      assert uploaded[key] == expected[key] or key[1].startswith(timed)

  def test_resumes_before_a_damaged_checkpoint(
    self, run_command, local_linear, bucket
  ):
    prefix = 'linear/checkpoints/12/state/d'
    (data, *_) = (name for name in bucket if name.startswith(prefix))
    bucket[data] = bytes(len(bucket[data]))
    code, _, err = train_linear(run_command, 'gs://runs/linear')
    assert code == 0, err
    assert 'Resuming after step 9.' in err
    moved = 'linear/checkpoints/12.unreadable/'
    assert any(name.startswith(moved) for name in bucket)
    assert_same_run('gs://runs/linear', local_linear)

  @pytest.mark.parametrize(
    'lost',
    [
      'checkpoints/6/commit_success.txt',
      *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
          'checkpoints/3/commit_success.txt',
          'checkpoints/6/state/manifest.ocdbt',
          'metrics.jsonl',
          'tensorboard/',
        )
      ),
    ],
  )
  def test_failed_upload_loses_no_step(
    self, run_command, local_linear, buckets, lost
  ):
    name = lost.replace('/', '-')
    buckets.fault = lambda method, path: (
      403 if method != 'GET' and path.startswith(f'{name}/{lost}') else None
    )
    code, _, err = train_linear(run_command, f'gs://runs/{name}')
    assert code == 1, err
    assert err.splitlines()[-1].startswith('nfnet_jax: ')
    assert f'Check gs://runs/{name}. Then the same command resumes' in err
    buckets.clear_faults()
    code, _, err = train_linear(run_command, f'gs://runs/{name}')
    assert code == 0, err
    resumed = 'Resuming after step 3.' in err
    assert resumed == lost.startswith('checkpoints/6'), err
    assert_same_run(f'gs://runs/{name}', local_linear)


@pytest.fixture
def local(run_command, recipe, folder):
  """The real run on a disk, for comparison."""
  workdir = folder / 'real'
  if not workdir.exists():
    code, _, err = run_command(train.main, *recipe, f'--workdir={workdir}')
    assert code == 0, err
  return workdir


@pytest.mark.slow
class TestRun:
  """A run of the command in the bucket; its tests depend on their order."""

  def test_trains(self, run_command, recipe, local, bucket):
    code, out, err = run_command(train.main, *recipe, '--workdir=gs://runs/one')
    assert code == 0, err
    assert not out
    inside = {name.split('/')[1] for name in bucket if name.startswith('one/')}
    assert inside - {''} == {path.name for path in local.iterdir()}

  def test_writes_the_same_files_as_on_a_disk(self, local):
    assert_same_run('gs://runs/one', local)
    names = 'config.json', 'classes.txt'
    for name in names:
      there = epath.Path('gs://runs/one') / name
      assert there.read_text() == (local / name).read_text()

  def test_is_evaluated(self, run_command):
    arguments = '--workdir=gs://runs/one', '--json'
    code, out, err = run_command(evaluate.main, *arguments, on_a_run=True)
    assert code == 0, err
    (row,) = (r for r in rows_of('gs://runs/one') if 'eval/top1' in r)
    assert json.loads(out)['loss'] == pytest.approx(row['eval/loss'], rel=1e-6)

  @pytest.mark.parametrize('inside', ['', '/checkpoints/3'])
  def test_serves_as_weights(self, local, inside):
    weights = load.load_weights(f'gs://runs/one{inside}')
    expected = load.load_weights(f'{local}{inside}')
    assert weights.metadata() == expected.metadata()
    jax.tree.map(np.testing.assert_array_equal, weights.params, expected.params)
    save.save_weights('gs://runs/mine.npz', weights)
    again = load.load_weights('gs://runs/mine.npz')
    jax.tree.map(np.testing.assert_array_equal, again.params, weights.params)

  def test_is_not_changed_by_another_experiment(self, run_command, recipe):
    arguments = *recipe, '--config.seed=1', '--workdir=gs://runs/one'
    code, _, err = run_command(train.main, *arguments)
    assert code == 2
    assert "'gs://runs/one' holds another experiment" in err


def test_unusable_workdirs_are_refused(
  run_command, recipe, buckets, bucket, monkeypatch
):
  before = dict(bucket)

  def assert_refused(workdir, text):
    code, _, err = run_command(train.main, *recipe, f'--workdir={workdir}')
    assert code == 2, err
    (line,) = (n for n in err.splitlines() if n.startswith('nfnet_jax: '))
    assert text in line
    assert 'model ' not in err

  assert_refused('gs://nowhere/run', "There is no bucket 'nowhere'.")
  assert_refused('s3://runs/one', 'neither a local folder nor gs://BUCKET')
  assert_refused('gs:///one', 'neither a local folder nor gs://BUCKET')
  buckets.withheld = {'storage.objects.create', 'storage.buckets.get'}
  lacking = 'storage.buckets.get, storage.objects.create'
  assert_refused('gs://runs/new', f"'runs' does not grant you {lacking}.")
  buckets.clear_faults()
  buckets.fault = lambda method, name: 403
  assert_refused('gs://runs/new', "Opening the bucket 'runs' failed (403")
  buckets.clear_faults()
  monkeypatch.setitem(sys.modules, 'google.cloud', None)
  assert_refused('gs://runs/new', "pip install -c constraints.txt '.[gcs]'")
  assert bucket == before


def test_overloaded_bucket_is_a_temporary_failure(
  run_command, recipe, buckets, monkeypatch
):
  def busy(*_):
    raise exceptions.ServiceUnavailable('try again')

  def assert_failed(text):
    code, _, err = run_command(train.main, *recipe, '--workdir=gs://runs/busy')
    assert code == 1, err
    assert 'Traceback' not in err
    (line,) = (n for n in err.splitlines() if n.startswith('nfnet_jax: '))
    assert text in line

  with monkeypatch.context() as patch:
    patch.setattr(storage.Bucket, 'test_iam_permissions', busy)
    assert_failed("Opening the bucket 'runs' failed (503 try again)")
  buckets.fault = lambda method, name: (
    503 if name == 'busy/config.json' else None
  )
  assert_failed('Reading gs://runs/busy/config.json failed (')


@pytest.mark.parametrize(
  ('workdir', 'text'),
  [
    ('gs://nowhere/run', 'holds no run'),
    ('s3://runs/one', 'neither a local folder nor gs://BUCKET'),
  ],
)
def test_evaluate_refuses_a_workdir_without_a_run(run_command, workdir, text):
  code, _, err = run_command(
    evaluate.main, f'--workdir={workdir}', on_a_run=True
  )
  assert code == 2
  # Google's libraries may first warn about missing credentials.
  (line,) = [line for line in err.splitlines() if 'nfnet_jax: ' in line]
  assert text in line
  assert line == err.splitlines()[-1]


def test_weights_are_saved_and_loaded():
  _, weights = trained_weights.random_weights('nfnet_pico')
  save.save_weights('gs://runs/weights.npz', weights)
  loaded = load.load_weights('gs://runs/weights.npz')
  jax.tree.map(np.testing.assert_array_equal, loaded.params, weights.params)


def test_error_names_weights_that_cannot_be_read(buckets):
  buckets.fault = lambda method, name: 403
  message = "^Weights 'gs://runs/one' cannot .*403[^\n]*$"
  with pytest.raises(network.WeightsError, match=message):
    load.load_weights('gs://runs/one')


def test_refused_upload_is_an_os_error(buckets, bucket):
  buckets.fault = lambda method, name: None if method == 'GET' else 403
  with metrics.MetricsWriter('gs://runs/refused', resumed_step=0) as writer:
    writer.write([{'step': 1, 'loss': 1.0}])
    with pytest.raises(OSError, match=r'Writing gs://runs/refused/.* failed'):
      writer.publish()
  assert not any(name.startswith('refused') for name in bucket)


def test_objects_are_replaced_atomically(bucket):
  path = 'gs://runs/file.txt'
  files.write_atomically(path, 'one')
  with contextlib.suppress(KeyError), files.atomically(path) as temporary:
    temporary.write_text('half of')
    raise KeyError
  assert bucket['file.txt'] == b'one'
  files.write_atomically(path, 'two')
  assert bucket['file.txt'] == b'two'


@pytest.mark.full
def test_survives_kills(run_command, recipe, buckets, tmp_path):
  """Kill a run during the upload of a checkpoint, and between two of them."""
  arguments = *recipe, '--config.train_for=12 steps', '--workdir=gs://runs/kill'
  whole = *arguments[:-1], f'--workdir={tmp_path}'
  code, _, err = run_command(train.main, *whole)
  assert code == 0, err
  for last in (
    'checkpoints/3/state/_METADATA',
    'checkpoints/3/commit_success.txt',
    'metrics.jsonl',
    'checkpoints/9/checksums/metadata',
  ):
    process = process_groups.Process(process_groups.TRAIN, *arguments)

    def kill(method, name, last=last, process=process):
      if method != 'GET' and name == f'kill/{last}':
        process.send(signal.SIGKILL)
        return 503
      return None

    buckets.fault = kill
    assert process.finish() == -signal.SIGKILL, process.output
  buckets.clear_faults()
  process = process_groups.Process(process_groups.TRAIN, *arguments)
  assert process.finish() == 0, process.output
  assert_same_run('gs://runs/kill', tmp_path)
