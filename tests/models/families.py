"""The miniature of every family, as test parameters, and smaller NFNets."""

from collections.abc import Iterator
import contextlib
import dataclasses

import pytest

from nfnet_jax.models import nfnet, registry

# Every family must have a model with 'pico' in its name.
PICOS = [
  next(name for name in names.values() if 'pico' in name)
  for names in registry.FAMILIES.values()
]


def picos(quick=()):
  """Return one parameter per family, marked slow unless named in `quick`.

  Compiling a network takes seconds, so tests that are not slow compile few.
  """
  return [
    pytest.param(name, marks=() if name in quick else pytest.mark.slow)
    for name in PICOS
  ]


SMALL_NFNET = 'nfnet_small'


@contextlib.contextmanager
def small_nfnet(depth: tuple[int, int, int, int]) -> Iterator[str]:
  """Register a shallower `nfnet_pico` during a test, and yield its name."""
  variant = dataclasses.replace(nfnet.VARIANTS['pico'], depth=depth)
  row = dataclasses.replace(
    registry.get_model_spec('nfnet_pico'), name=SMALL_NFNET, variant='small'
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(nfnet.VARIANTS, 'small', variant)
    patch.setitem(registry._SPECS, SMALL_NFNET, row)
    yield SMALL_NFNET
