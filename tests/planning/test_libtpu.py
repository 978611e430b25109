"""Plans by the real TPU compiler.

Each runs in its own process, because libtpu takes a lock and handles signals.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip('libtpu')

PLAN = [
  '--config=f0',
  '--config.model.name=nfnet_pico',
  '--config.batch_size=32',
  '--topology=v3:2x2',
]


def run(arguments, tmp_path, **variables):
  command = [sys.executable, '-m', 'nfnet_jax.experiments.plan', *arguments]
  return subprocess.run(
    command,
    capture_output=True,
    text=True,
    env={
      **os.environ,
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
      'XDG_CACHE_HOME': str(tmp_path),
      **variables,
    },
  )


@pytest.mark.slow
def test_plan_of_a_real_step(tmp_path):
  first = run([*PLAN, '--json'], tmp_path)
  assert first.returncode == 0, first.stderr
  assert (
    'Compiling nfnet_pico for v3:2x2, 4 images per core (full)' in first.stderr
  )
  row = json.loads(first.stdout)
  assert row['devices'] == 8
  assert row['hosts'] == 1
  assert row['compute_dtype'] == 'bfloat16'
  assert row['fits']
  # Parameters, momentum and EMA in float32, and a few scalars.
  assert row['state_bytes'] == pytest.approx(
    3 * row['parameter_bytes'], rel=0.01
  )
  assert row['state_bytes'] < row['peak_bytes'] < 2**26
  assert 3e5 < row['step_cycles'] < 8e5
  assert row['step_ms'] == pytest.approx(row['step_cycles'] / 940e3)
  assert row['unknown_loops'] == 0
  # All gradients are summed once, small ones in bfloat16. Large kernels are
  # gathered in bfloat16, and each device keeps an eighth of them.
  moved = row['collective_bytes'] / row['parameter_bytes']
  assert 1.3 < moved < 1.5
  assert row['state_bytes_per_device'] < 0.35 * row['state_bytes']
  cycles = {name: sum(both.values()) for name, both in row['cycles'].items()}
  assert sum(cycles.values()) == row['step_cycles']
  stages = {f'convolutions, stage {index}' for index in range(4)}
  kinds = {'AGC', 'optimiser and EMA', 'weight standardisation'}
  assert {'convolutions, stem', 'squeeze-excite', *stages, *kinds} <= set(
    cycles
  )
  # Almost all cycles have a category.
  assert cycles['loss and the rest'] < 0.03 * row['step_cycles']
  assert 'convolutions, elsewhere' not in cycles

  again = run(PLAN, tmp_path)
  assert again.returncode == 0, again.stderr
  assert 'Compiling' not in again.stderr
  assert f'{row["step_ms"]:.1f} ms estimated' in again.stdout


@pytest.mark.slow
def test_memory_of_each_generation(tmp_path):
  """The table agrees with the compiler's message for a too large program."""
  program = """
import jax, jax.numpy as jnp
from nfnet_jax.planning import plan_errors, topology
layouts = {'v4': '2x2x1', 'v5p': '2x2x1'}
for name, kind in topology.GENERATIONS.items():
  pod = topology.get_pod(f'{name}:{layouts.get(name, "2x2")}')
  assert len(pod.devices) == 4 * kind.devices_per_chip, name
  assert pod.chips == 4, name
  shape = jax.ShapeDtypeStruct((len(pod.devices), 2**18, 2**18), jnp.float32)
  lowered = jax.pmap(jnp.sum, devices=pod.devices).lower(shape)
  try:
    with plan_errors.translate_compiler_errors():
      lowered.compile()
  except plan_errors.DoesNotFitError as error:
    # Releases of libtpu differ by 0.01 GiB.
    assert abs(error.available - kind.memory_bytes) < 2**24, (name, error)
    assert error.needed >= 2**38, (name, error)
  else:
    raise AssertionError(name)
"""
  made = subprocess.run(
    [sys.executable, '-c', program],
    capture_output=True,
    text=True,
    env={**os.environ, 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'},
  )
  assert made.returncode == 0, made.stderr


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--topology=v3:3x3'], 'does not support'),
    pytest.param(
      ['--topology=v3:4x4'], 'data.shards 8 is not', marks=pytest.mark.slow
    ),
  ],
)
def test_unsuitable_pods(tmp_path, flags, message):
  made = run([*PLAN, *flags], tmp_path)
  assert made.returncode == 2
  (line,) = [x for x in made.stderr.splitlines() if x.startswith('nfnet_jax: ')]
  assert message in line


@pytest.mark.slow
def test_libtpu_locked_by_another_process(tmp_path):
  holder = subprocess.Popen(
    [
      sys.executable,
      '-c',
      'import time; from nfnet_jax.planning import topology; '
      'topology.get_pod("v3:2x2"); print("held", flush=True); time.sleep(600)',
    ],
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, 'ALLOW_MULTIPLE_LIBTPU_LOAD': '0'},
  )
  try:
    if not holder.stdout.readline().startswith('held'):
      pytest.skip('Another process of this machine holds libtpu.')
    made = run(PLAN, tmp_path, ALLOW_MULTIPLE_LIBTPU_LOAD='0')
  finally:
    holder.kill()
    holder.wait()
  assert made.returncode == 2
  assert 'nfnet_jax: Another process holds libtpu' in made.stderr
