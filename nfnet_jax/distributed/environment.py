"""The installed code and packages, for comparison between hosts."""

from __future__ import annotations

import hashlib
from importlib import metadata
import pathlib
import platform
import re

# These must be the same on all hosts, or devices hang or results differ.
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
# Prefixes of JAX's plugins and of the libraries that they call.
_PREFIXES = ('jax', 'libtpu', 'nvidia-')


def describe() -> dict[str, str]:
  """Return a digest of this package's code and the versions of what it uses.

  Examples:
    >>> 'jaxlib' in describe()
    True
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
  versions = {'Python': platform.python_version()}
  # Reversed, because Python imports the first of two with the same name.
  for distribution in reversed(list(metadata.distributions())):
    # Normalized as pip does; a broken installation has no name.
    name = re.sub('[-_.]+', '-', distribution.metadata['Name'] or '').lower()
    if name in _PACKAGES or name.startswith(_PREFIXES):
      versions[name] = distribution.version
  return versions
