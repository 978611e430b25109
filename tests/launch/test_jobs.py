"""The example jobs for Slurm and Kubernetes."""

import math
import pathlib
import subprocess

import pytest
import yaml

from tests.launch import conftest

LAUNCH = pathlib.Path(__file__).parents[2] / 'launch'
COMMAND = ['-m', 'nfnet_jax.experiments.train']


@pytest.mark.parametrize('code', [0, 1, 2, 75])
def test_slurm_runs_the_command_and_requeues_if_interrupted(tmp_path, code):
  record = tmp_path / 'record'
  scripts = {
    'srun': f'printf "%s\\n" "$@" >>{record}; exit {code}',
    'scontrol': f'echo "scontrol $*" >>{record}',
  }
  conftest.write_scripts(tmp_path / 'bin', scripts)
  run = subprocess.run(
    [LAUNCH / 'slurm.sh', '--config=f3', '--config.note=a "b" c'],
    env={'PATH': f'{tmp_path}/bin:/usr/bin:/bin', 'SLURM_JOB_ID': '7'},
  )
  assert run.returncode == code
  command = ['.venv/bin/python', *COMMAND, '--require_platform=gpu']
  command += ['--config=f3', '--config.note=a "b" c']
  requeued = ['scontrol requeue 7'] if code == 75 else []
  assert record.read_text().splitlines() == command + requeued


def test_slurm_starts_a_process_per_gpu_and_leaves_time_to_save():
  lines = (LAUNCH / 'slurm.sh').read_text().splitlines()
  # sbatch reads its flags up to the first command.
  lines = lines[: lines.index('set -euo pipefail')]
  options = dict(
    line.removeprefix('#SBATCH --').partition('=')[::2]
    for line in lines
    if line.startswith('#SBATCH')
  )
  assert options['ntasks-per-node'] == options['gpus-per-node']
  assert options['signal'] == 'TERM@600'
  assert {'requeue', 'nodes', 'time'} <= set(options)


def test_kubernetes_uses_one_slice_and_resumes():
  job_set = yaml.safe_load((LAUNCH / 'kubernetes.yaml').read_text())
  assert job_set['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
  assert job_set['kind'] == 'JobSet'
  annotation = 'alpha.jobset.sigs.k8s.io/exclusive-topology'
  pool = job_set['metadata']['annotations'][annotation]
  assert pool == 'cloud.google.com/gke-nodepool'
  (workers,) = job_set['spec']['replicatedJobs']
  job = workers['template']['spec']
  pod = job['template']['spec']
  (container,) = pod['containers']
  selector = pod['nodeSelector']
  assert selector['cloud.google.com/gke-tpu-accelerator'] == 'tpu-v6e-slice'
  topology = selector['cloud.google.com/gke-tpu-topology']
  chips = container['resources']['limits']['google.com/tpu']
  hosts = math.prod(map(int, topology.split('x'))) // chips
  assert job['parallelism'] == job['completions'] == hosts
  assert workers['replicas'] == 1
  assert (job['completionMode'], job['backoffLimit']) == ('Indexed', 0)
  assert pod['restartPolicy'] == 'Never'
  assert job_set['spec']['failurePolicy']['maxRestarts'] > 0
  assert container['command'] == ['python', *COMMAND]
  assert '--require_platform=tpu' in container['args']
  assert '--workdir=gs://BUCKET/runs/f3' in container['args']


def test_kubernetes_does_not_retry_bad_input():
  spec = yaml.safe_load((LAUNCH / 'kubernetes.yaml').read_text())['spec']
  job = spec['replicatedJobs'][0]['template']['spec']
  (pod_rule,) = job['podFailurePolicy']['rules']
  assert pod_rule['action'] == 'FailJob'
  codes = pod_rule['onExitCodes']
  assert (codes['operator'], codes['values']) == ('In', [2])
  container = job['template']['spec']['containers'][0]['name']
  assert codes['containerName'] == container
  (rule,) = spec['failurePolicy']['rules']
  assert rule['action'] == 'FailJobSet'
  assert rule['onJobFailureReasons'] == ['PodFailurePolicy']
