"""The miniature of every family, as test parameters."""

import pytest

from nfnet_jax.models import registry

# A family without a model named so is an error here.
PICOS = [
  next(name for name in names.values() if 'pico' in name)
  for names in registry.FAMILIES.values()
]


def picos(quick=()):
  """Return one parameter per family, marked slow unless named in `quick`.

  Compiling a network takes seconds: a test compiles two in the quick suite.
  """
  return [
    pytest.param(name, marks=() if name in quick else pytest.mark.slow)
    for name in PICOS
  ]
