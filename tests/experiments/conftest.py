"""A compiler for the commands that plan.

The commands compare weights with shapes that are traced once.
"""

import types

import jax
import pytest

from nfnet_jax.planning import compilation
from nfnet_jax.training import data_parallel
from tests.planning import compilers
from tests.weights import trees


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch):
  trees.trace_once(monkeypatch)


@pytest.fixture
def lowering_compiler(monkeypatch):
  """A `Compiler` of steps that are lowered, for 8 CPU devices."""
  made = compilers.Compiler()
  monkeypatch.setattr(compilation, 'compile_step', made.compile_step)
  compilers.provide(monkeypatch, jax.devices())
  return made


@pytest.fixture
def compiler(lowering_compiler, monkeypatch):
  """A `Compiler` of steps that are not lowered, which would take seconds."""

  def lower(self, trainer, state, batch):
    image, devices = batch['image'], self.num_local
    shape = devices, image.shape[0] // devices, *image.shape[1:]
    sharded = {'image': jax.ShapeDtypeStruct(shape, image.dtype)}
    return types.SimpleNamespace(args_info=((state, sharded), {}))

  monkeypatch.setattr(data_parallel.DataParallel, 'lower', lower)
  return lowering_compiler
