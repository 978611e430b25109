"""The site of the documentation is built without warnings; notebooks run."""

import os
import pathlib
import subprocess
import sys

import nbclient
import nbformat
import pytest

import nfnet_jax
from nfnet_jax.models import registry
from tests.pages import ROOT

NOTEBOOKS = sorted((ROOT / 'docs' / 'notebooks').glob('*.ipynb'))


@pytest.mark.slow
def test_model_pages_are_current(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / 'docs' / 'site')
  import model_pages

  for family in registry.FAMILIES:
    path = model_pages.path_of(family)
    assert path.read_text() == model_pages.page(family), (
      'run: python docs/site/model_pages.py'
    )


def test_navigation_has_every_guide_and_model():
  navigation = (ROOT / 'mkdocs.yml').read_text()
  pages = [*(ROOT / 'docs').rglob('*.md'), *NOTEBOOKS]
  for page in pages:
    assert str(page.relative_to(ROOT)) in navigation


def test_api_pages_have_every_public_name():
  pages = ''.join(
    path.read_text() for path in (ROOT / 'docs' / 'api').glob('*.md')
  )
  aliases = {'create', 'nfnet_sgd'}
  for name in set(nfnet_jax.__all__) - aliases:
    assert f'::: nfnet_jax.{name}\n' in pages


@pytest.mark.slow
def test_site_is_built_without_warnings(tmp_path):
  command = [sys.executable, '-m', 'mkdocs', 'build', '--strict']
  done = subprocess.run(
    [*command, '--site-dir', tmp_path],
    cwd=ROOT,
    env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert 'clip_units' in (tmp_path / 'docs/api/agc/index.html').read_text()


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_was_saved_with_outputs(path: pathlib.Path):
  notebook = nbformat.read(path, 4)
  saved = [len(cell.outputs) for cell in notebook.cells if 'outputs' in cell]
  nbclient.NotebookClient(notebook, timeout=600).execute()
  found = [len(cell.outputs) for cell in notebook.cells if 'outputs' in cell]
  assert [bool(n) for n in found] == [bool(n) for n in saved]
