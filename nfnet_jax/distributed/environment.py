"""What is installed here, to be compared between hosts."""

import hashlib
from importlib import metadata
import pathlib
import platform
import re

# What must be the same everywhere, or devices hang or results differ.
_PACKAGES = (
  'jax',
  'jaxlib',
  'numpy',
  'dm-haiku',
  'optax',
  'orbax-checkpoint',
  'tensorstore',
  'tensorflow-cpu',
  'tensorflow-datasets',
)
# Plugins of JAX, and the libraries that they call.
_KINDS = ('jax', 'libtpu', 'nvidia-')


def describe() -> dict[str, str]:
  """Names this package's code and the versions of what it stands on.

  Example:
    >>> sorted(describe())[:2]
    ['Python', 'dm-haiku']
  """
  return {'the code': _digest_of_code(), **_versions()}


def _digest_of_code() -> str:
  package = pathlib.Path(__file__).parents[1]
  digest = hashlib.sha256()
  for path in sorted(package.rglob('*.py')):
    digest.update(f'{path.relative_to(package)}\n'.encode())
    digest.update(path.read_bytes())
  return digest.hexdigest()[:12]


def _versions() -> dict[str, str]:
  versions = {
    'Python': platform.python_version(),
    **dict.fromkeys(_PACKAGES, 'none'),
  }
  # Of two of a name the first is imported.
  for distribution in reversed(list(metadata.distributions())):
    # As pip compares names; a broken installation has none.
    name = re.sub('[-_.]+', '-', distribution.metadata['Name'] or '').lower()
    if name in _PACKAGES or name.startswith(_KINDS):
      versions[name] = distribution.version
  return versions
