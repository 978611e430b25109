"""The commands of the guides, run as they are written.

Networks, images and numbers of steps are replaced by small ones.
"""

import json
import os
import pickle
import shlex
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

import nfnet_jax
from nfnet_jax.experiments import (
  convert,
  evaluate,
  export,
  features,
  models,
  predict,
  prepare,
  show_batch,
  signal_propagation,
  train,
)
from tests import trained_weights
from tests.end_to_end import process_groups
from tests.launch import conftest
from tests.pages import block, blocks, CONSUMER, ONNX_CONSUMER, README


def run_commands(run_command, text, expected):
  """Run the lines of a shell block.

  Args:
    run_command: the fixture.
    text: the block.
    expected: name of each command, in order -> its module, more arguments, and
      options of `run_command`.
  """
  lines = [shlex.split(line) for line in text.splitlines()]
  names = [
    module.removeprefix('nfnet_jax.experiments.') for _, _, module, *_ in lines
  ]
  assert names == list(expected)
  for name, (_, _, _, *arguments) in zip(names, lines):
    module, more, options = expected[name]
    result = run_command(module.main, *arguments, *more, **options)
    assert result[0] == 0, result


@pytest.mark.slow
def test_imagenet_commands_run(
  run_command, small_recipe, imagenet_tars, tmp_path, monkeypatch
):
  """With a small ImageNet and a small network, otherwise unchanged."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'tars').symlink_to(imagenet_tars)
  small = [flag for flag in small_recipe[1:] if 'data_dir' not in flag]
  run_commands(
    run_command,
    block('imagenet.md', 'sh', 'prepare imagenet2012'),
    {
      'prepare': (prepare, ['--partial'], {'takes': 'DATASET'}),
      'show_batch': (show_batch, small, {}),
      'train': (train, small, {}),
    },
  )
  for path in ('sheets/train.png', 'runs/f0/curves.png'):
    assert (tmp_path / path).is_file()


@pytest.mark.slow
def test_model_commands_run(run_command, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  table = block('reproduce.md', 'sh', 'experiments.models')
  plot = block('reproduce.md', 'sh', 'signal_propagation')
  run_commands(
    run_command,
    table + plot,
    {
      'models': (models, [], {'takes': '[PATTERN]'}),
      'signal_propagation': (signal_propagation, [], {'on_a_run': True}),
    },
  )
  assert (tmp_path / 'plots' / 'nf_resnet50.png').is_file()


@pytest.mark.slow
def test_trained_network_commands_run(
  run_command, small, imagenet_dir, tmp_path, monkeypatch
):
  """With a small network in the published format, otherwise unchanged."""
  monkeypatch.chdir(tmp_path)
  params, _ = trained_weights.randomize(nfnet_jax.create_model('nfnet_pico'))
  # A file in the place of the published weights, which are not fetched then.
  (tmp_path / 'F0').write_bytes(pickle.dumps(params))
  (tmp_path / 'datasets').symlink_to(imagenet_dir)
  (tmp_path / 'photos').mkdir()
  Image.new('RGB', (60, 40), 'red').save(tmp_path / 'photos' / 'red.jpg')
  use = block('weights.md', 'sh', 'experiments.predict')
  fine_tune = block('fine_tuning.md', 'sh', '--workdir=runs/cifar10\n')
  short = [*small[1:], '--config.dataset=digits', '--config.data.shards=8']
  pico = ['--config.model.name=nfnet_pico', '--config.run.eval_batch_size=16']
  run_commands(
    run_command,
    use + fine_tune,
    {
      'predict': (predict, [], {'takes': 'IMAGE...'}),
      'evaluate': (evaluate, pico, {'on_a_run': True}),
      'features': (features, [], {'takes': '[IMAGE...]'}),
      'convert': (convert, [], {}),
      'train': (train, short, {}),
    },
  )
  for path in ('predictions.png', 'features.npz', 'F0.safetensors'):
    assert (tmp_path / path).is_file()
  assert nfnet_jax.load_weights('runs/cifar10').num_classes == 10


@pytest.mark.slow
def test_own_image_commands_run(run_command, tmp_path, monkeypatch):
  """With small images and a small network in the published format.

  The run that the first command makes has the names of the classes.
  """
  monkeypatch.chdir(tmp_path)
  params, _ = trained_weights.randomize(nfnet_jax.create_model('nfnet_pico'))
  (tmp_path / 'F0').write_bytes(pickle.dumps(params))
  for index in range(100):
    path = tmp_path / 'photos' / ('cats', 'dogs')[index % 2] / f'{index}.webp'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (20, 20), ('red', 'blue')[index % 2]).save(path)
  (small,) = [code for code in blocks(README, 'sh') if ':small' in code]
  short = ['--config.train_for=2 epochs', '--config.run.eval_every=2 epochs']
  run_commands(run_command, small, {'train': (train, short, {})})
  config = json.loads((tmp_path / 'runs/photos/config.json').read_text())
  assert config['data']['eval_split'] == 'train[:20%]'
  code, out, err = run_command(
    predict.main,
    '--weights=runs/photos',
    'photos/cats/0.webp',
    takes='IMAGE...',
  )
  assert code == 0, err
  assert 'cats' in out
  assert 'dogs' in out
  scratch = block('experiments.md', 'sh', 'eval_split=10%')
  pico = ['--config.model.name=nfnet_pico', '--config.batch_size=16', *short]
  pico += ['--config.optimizer.warmup=1 step', '--workdir=runs/scratch']
  run_commands(run_command, scratch, {'train': (train, pico, {})})


@pytest.mark.slow
@pytest.mark.parametrize('name', ['nfnet_pico', 'bn_resnet_pico'])
def test_exported_model_runs_without_this_package(
  run_command, tmp_path, monkeypatch, name
):
  _, trained = trained_weights.random_weights(name)
  (tmp_path / 'runs').mkdir()
  nfnet_jax.save_weights(tmp_path / 'runs' / 'f0.npz', trained)
  (tmp_path / 'runs' / 'f0.npz').rename(tmp_path / 'runs' / 'f0')
  trained_weights.draw_photo(tmp_path / 'photo.jpg')
  monkeypatch.chdir(tmp_path)
  text = block('export.md', 'sh', '--out=exported\n')
  run_commands(run_command, text, {'export': (export, [], {})})
  blocked = 'import sys; sys.modules.update(haiku=None, nfnet_jax=None)\n'
  run = subprocess.run(
    [sys.executable, '-c', blocked + CONSUMER],
    check=True,
    capture_output=True,
    text=True,
  )
  flags = '--weights=runs/f0', '--json', 'photo.jpg'
  code, out, err = run_command(predict.main, *flags, takes='IMAGE...')
  assert code == 0, err
  (image,) = json.loads(out)['images']
  lines = [line.split(maxsplit=1) for line in run.stdout.splitlines()]
  assert [row['name'] for row in image['top5']] == [text for _, text in lines]
  for row, (share, _) in zip(image['top5'], lines):
    assert abs(100 * row['probability'] - float(share.removesuffix('%'))) < 1


@pytest.mark.slow
def test_exported_onnx_model_runs(run_command, tmp_path, monkeypatch):
  _, trained = trained_weights.random_weights('eca_nfnet_pico')
  (tmp_path / 'runs').mkdir()
  nfnet_jax.save_weights(tmp_path / 'runs' / 'f0.npz', trained)
  (tmp_path / 'runs' / 'f0.npz').rename(tmp_path / 'runs' / 'f0')
  monkeypatch.chdir(tmp_path)
  text = block('export.md', 'sh', '--onnx')
  run_commands(run_command, text, {'export': (export, ['--size=256'], {})})
  found: dict = {}
  exec(ONNX_CONSUMER, found)
  np.testing.assert_allclose(found['probabilities'].sum(1), 1, rtol=1e-5)


@pytest.mark.slow
def test_plan_command_runs(tmp_path):
  """With a small network, in a separate process; see `tests/planning/`."""
  pytest.importorskip('libtpu')
  _, line = block('plan.md', 'sh', "'.[plan]'").splitlines()
  command = [sys.executable, *shlex.split(line)[1:]]
  command += ['--config.model.name=nfnet_pico', '--config.batch_size=512']
  run = subprocess.run(
    [*command, '--quick'],
    capture_output=True,
    text=True,
    env={
      **os.environ,
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
      'XDG_CACHE_HOME': str(tmp_path),
    },
  )
  assert run.returncode == 0, run.stderr
  assert '128 cores of 64 chips TPU v3, 16 hosts' in run.stdout
  assert 'convolutions, stage 3' in run.stdout


@pytest.mark.slow
def test_search_command_runs(tmp_path):
  """With a small network, in a separate process."""
  pytest.importorskip('libtpu')
  line = block('plan.md', 'sh', '--search').strip()
  command = [sys.executable, *shlex.split(line)[1:], '--quick']
  run = subprocess.run(
    [*command, '--config.model.name=nfnet_pico'],
    capture_output=True,
    text=True,
    env={
      **os.environ,
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
      'XDG_CACHE_HOME': str(tmp_path),
    },
  )
  assert run.returncode == 0, run.stderr
  assert 'fastest      --config.run.accumulate=1' in run.stdout


def test_cloud_commands_run(tmp_path):
  """As a dry run, which calls nothing outside the repository."""
  text = block('pods.md', 'sh', 'launch/')
  dry = text.replace('launch/supervise.sh', 'launch/supervise.sh --dry_run')
  run = subprocess.run(
    ['bash', '-euc', dry],
    cwd=conftest.Cloud(tmp_path).repo,
    env={'PATH': '/usr/bin:/bin'},
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stderr
  for command in (
    'queued-resources create f3',
    '--accelerator-type=v3-128',
    '--spot',
    '--project=my-project --zone=europe-west4-a',
    'tpu-vm ssh f3 --worker=all',
    '--config=f3 --workdir=gs://my-bucket/runs/f3 --require_platform=tpu',
    '--config.run.data_dir=gs://my-bucket/datasets',
    'queued-resources delete f3',
  ):
    assert command in run.stdout


@pytest.mark.slow
def test_command_of_several_hosts_runs(small, tmp_path):
  """With processes in place of hosts, and a small config."""
  (line,) = block('pods.md', 'sh', '--coordinator').splitlines()
  for shown, here in {
    'host0:8476': f'127.0.0.1:{process_groups.free_port()}',
    '--num_processes=4': '--num_processes=2',
    '--config=f0': ' '.join(map(shlex.quote, small)),
    '--workdir=runs/f0': f'--workdir={tmp_path}/run',
  }.items():
    assert line.count(shown) == 1
    line = line.replace(shown, here)
  assert line.endswith('--process_id=0')
  _, _, module, *arguments, _ = shlex.split(line)
  processes = [
    process_groups.Process(
      module, *arguments, f'--process_id={index}', devices=4
    )
    for index in range(2)
  ]
  for process in processes:
    assert process.finish() == 0, process.output
  assert 'process    1 of 2' in processes[1].lines
  assert process_groups.checkpoints_of(tmp_path / 'run') == [3, 6]
