"""The README and the guides, and the code blocks and commands in them."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / 'README.md'
PAGES = [
  README,
  ROOT / 'CONTRIBUTING.md',
  *sorted((ROOT / 'docs').rglob('*.md')),
]


def blocks(page, language):
  """Return the code blocks of a page that are in a language, '' for output."""
  fences = re.findall(r'^```(\w*)\n(.*?)^```$', page.read_text(), re.S | re.M)
  return [code for name, code in fences if name == language]


def block(page, language, part):
  """Return the only code block of a page of `docs/` that contains `part`."""
  found = blocks(ROOT / 'docs' / page, language)
  (code,) = [code for code in found if part in code]
  return code


def commands(page):
  """Return the commands of a page's shell blocks."""
  lines = '\n'.join(blocks(page, 'sh')).replace('\\\n', ' ').splitlines()
  return [part for line in lines if line for part in line.split(' && ')]


def page_id(page):
  return str(page.relative_to(ROOT))


def inline_code(page):
  """Return the words of a page's inline code."""
  prose = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.S | re.M)
  spans = re.findall(r'`([^`]+)`', prose)
  return [word for span in spans for word in span.split()]


# Needs the files of a command; runs where this package cannot be imported.
CONSUMER = block('export.md', 'python', 'stablehlo')
ONNX_CONSUMER = block('export.md', 'python', 'onnxruntime')
