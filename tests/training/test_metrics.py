"""Metrics files and the figure made of them."""

import json
import math

from PIL import Image
import pytest

from nfnet_jax import errors
from nfnet_jax.storage import files
from nfnet_jax.training import curves, metrics


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_after_the_resumed_step_are_dropped(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  with metrics.MetricsWriter(tmp_path, resumed_step=0) as writer:
    writer.write([{'step': s, 'loss': 1 / s} for s in range(1, 6)])
  # A killed run leaves an incomplete line.
  with path.open('a') as file:
    file.write('{"step": 6, "lo')
  with metrics.MetricsWriter(tmp_path, resumed_step=3) as writer:
    writer.write([{'step': 4, 'loss': 9.0}])
  assert [row['step'] for row in lines(path)] == [1, 2, 3, 4]
  assert lines(path)[-1]['loss'] == 9


def test_nan_is_valid_json(tmp_path):
  with metrics.MetricsWriter(tmp_path, resumed_step=0) as writer:
    writer.write([{'step': 1, 'loss': float('nan')}])
  path = tmp_path / 'metrics.jsonl'
  assert lines(path) == [{'step': 1, 'loss': None}]
  assert math.isnan(metrics.read_metrics(path)[0]['loss'])


def test_tensorboard_events_hold_the_rows(tmp_path):
  from tensorboardX.proto import event_pb2

  with metrics.MetricsWriter(tmp_path, resumed_step=0) as writer:
    writer.write([{'step': 2, 'eval/top1': 0.5}])
    writer.observe(2, {'images_per_second': 70.0})
  (path,) = (tmp_path / 'tensorboard').iterdir()
  content, values = path.read_bytes(), {}
  while content:  # A record: length, its checksum, the event, its checksum.
    size = int.from_bytes(content[:8], 'little')
    event = event_pb2.Event.FromString(content[12 : 12 + size])
    values |= {(event.step, v.tag): v.simple_value for v in event.summary.value}
    content = content[16 + size :]
  assert values == {(2, 'eval/top1'): 0.5, (2, 'images_per_second'): 70}
  # Rows are compared between runs; speed always differs.
  assert lines(tmp_path / 'metrics.jsonl') == [{'step': 2, 'eval/top1': 0.5}]


def test_atomic_write_leaves_nothing_else(tmp_path):
  path = tmp_path / 'file.txt'
  files.write_atomically(path, 'one')
  files.write_atomically(path, 'two')
  assert path.read_text() == 'two'
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
  'clipped', ['', 'kernels', 'NFNet/~/nf_block_1/~/conv0']
)
def test_curves_are_written_as_png(tmp_path, clipped):
  rows = [
    {'step': s, 'loss': 2.0 / s, 'top1': 0.1, 'learning_rate': 0.1}
    | {'grad_norm': 1.0}
    | ({'clipped': 0.5, f'clipped/{clipped}': 0.4} if clipped else {})
    for s in range(1, 30)
  ]
  evaluation = {
    'step': 29,
    'eval/loss': 0.2,
    'eval/top1': 0.9,
    'eval_ema/loss': float('nan'),
  }
  with metrics.MetricsWriter(tmp_path, resumed_step=0) as writer:
    writer.write([*rows, evaluation])
  picture = curves.plot(tmp_path)
  assert picture == tmp_path / 'curves.png'
  assert picture.read_bytes().startswith(b'\x89PNG')
  # The map of layers stands below the other panels.
  assert (Image.open(picture).height > 1_000) == ('/' in clipped)


@pytest.mark.parametrize(
  'damage', [b'\x00\xff\n', b'{"loss": 1}\n', b'[]\n', b'{"step": null}\n']
)
def test_damaged_metrics_are_named(tmp_path, damage):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1}\n' + damage)
  with pytest.raises(errors.InputError, match=r'line 2 of .*metrics\.jsonl'):
    metrics.read_metrics(path)
