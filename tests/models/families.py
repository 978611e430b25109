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
# Depth -> name. The second has a block of every kind: transitions of strides 1
# and 2, and a plain block.
SMALL_NFNETS = {(1, 1, 0, 0): SMALL_NFNET, (1, 2, 0, 0): 'nfnet_three_blocks'}


class SmallNFNet(nfnet.NFNet):
  """A shallower `nfnet_pico`."""

  variants = {
    name: dataclasses.replace(nfnet.VARIANTS['pico'], depth=depth)
    for depth, name in SMALL_NFNETS.items()
  }


@contextlib.contextmanager
def small_nfnet(depth: tuple[int, int, int, int]) -> Iterator[str]:
  """Register a shallower `nfnet_pico` during a test, and yield its name."""
  name = SMALL_NFNETS[depth]
  registry.register_model(name, SmallNFNet, name, train_size=32, test_size=32)
  try:
    yield name
  finally:
    # Otherwise weights could be identified as this model's.
    registry.unregister_model(name)
