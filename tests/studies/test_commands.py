import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
STUDIES = [
  path.parent.name
  for path in sorted(ROOT.glob('experiments/*/run.py'))
  if 'study.main(' in path.read_text()
]


@pytest.mark.full
@pytest.mark.parametrize('name', STUDIES)
def test_quick_study_has_results_a_figure_and_a_verdict(name, tmp_path):
  command = [sys.executable, '-m', f'experiments.{name}.run', '--quick']
  subprocess.run([*command, f'--out={tmp_path}'], check=True, cwd=ROOT)
  assert (tmp_path / 'results.csv').read_text().count('\n') > 1
  assert (tmp_path / 'results.png').read_bytes().startswith(b'\x89PNG')
  assert (tmp_path / 'verdict.txt').read_text().strip()


@pytest.mark.parametrize('name', STUDIES)
def test_study_is_complete(name):
  folder = ROOT / 'experiments' / name
  readme = (folder / 'README.md').read_text()
  assert f'python -m experiments.{name}.run' in readme
  verdict = (folder / 'verdict.txt').read_text()
  assert ' '.join(verdict.split()) in ' '.join(readme.split())
  assert (folder / 'results.csv').exists()
  assert (folder / 'machine.json').exists()
