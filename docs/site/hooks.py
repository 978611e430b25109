"""Makes the site out of the Markdown files, at their paths in the repository.

A link between two files then works on the site as it does in the repository.
"""

from __future__ import annotations

import pathlib

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[2]
PAGES = (
  '*.md',
  'docs/**/*.md',
  'docs/notebooks/*.ipynb',
  'launch/*.md',
  'experiments/*/*.md',
)
# What pages show or link to.
OTHERS = (
  'LICENSE',
  'CITATION.cff',
  'docs/**/*.png',
  'experiments/*/*.png',
  'experiments/**/*.csv',
  'experiments/*/machine.json',
)


@event_priority(100)  # Before the plugin for notebooks, which converts them.
def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Add the pages and what they link to."""
  for pattern in (*PAGES, *OTHERS):
    for path in sorted(ROOT.glob(pattern)):
      if path.is_file():
        files.append(
          File(
            str(path.relative_to(ROOT)),
            str(ROOT),
            config.site_dir,
            config.use_directory_urls,
          )
        )
  return files
