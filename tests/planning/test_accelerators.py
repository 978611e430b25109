"""Accelerator types as topologies."""

import math

import pytest

from nfnet_jax.planning import accelerators, plan_errors, topology


@pytest.mark.parametrize(
  ('name', 'devices', 'layout'),
  [
    ('v2-8', 8, 'v2:2x2'),
    ('v3-128', 128, 'v3:8x8'),
    ('v3-2048', 2048, 'v3:32x32'),
    ('v4-8', 4, 'v4:2x2x1'),
    ('v4-512', 256, 'v4:4x8x8'),
    ('v5litepod-256', 256, 'v5e:16x16'),
    ('v5p-16', 8, 'v5p:2x2x2'),
    ('v6e-64', 64, 'v6e:8x8'),
    ('tpu7x-128', 128, 'tpu7x:4x4x4'),
    ('v6e-1', 1, None),
    ('v5p-384', 192, None),
  ],
)
def test_accelerator_type(name, devices, layout):
  accelerator = accelerators.parse(name)
  assert (accelerator.devices, accelerator.topology) == (devices, layout)
  if layout:
    kind = topology.parse(layout)
    chips = math.prod(map(int, layout.partition(':')[2].split('x')))
    assert devices == chips * kind.devices_per_chip


@pytest.mark.parametrize(
  'name', ['', 'v3', 'v3-', 'v3-0', 'v5e-8', 'v3:8x8', 'v7x-128', 'v3-8x']
)
def test_other_names_are_refused(name):
  with pytest.raises(plan_errors.PlanError, match='not an accelerator type'):
    accelerators.parse(name)


def test_core_counts_are_even():
  with pytest.raises(plan_errors.PlanError, match='even number of cores'):
    accelerators.parse('v3-3')
