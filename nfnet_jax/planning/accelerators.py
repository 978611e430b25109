"""Accelerator types of Cloud TPU, such as 'v3-128', as topologies.

The sizes and layouts are those of Google Cloud's pages on each generation:
cloud.google.com/tpu/docs/v2 to tpu7x. Where Cloud offers several layouts, the
layout here is the one that it chooses for the accelerator type.
"""

from __future__ import annotations

import dataclasses
import re

from nfnet_jax.planning import plan_errors, topology

# Chips -> layout. libtpu 0.0.42.1 knows all of them.
_FLAT = {
  4: '2x2',
  8: '2x4',
  16: '4x4',
  32: '4x8',
  64: '8x8',
  128: '8x16',
  256: '16x16',
  512: '16x32',
  1024: '32x32',
}
_CUBIC = {
  4: '2x2x1',
  8: '2x2x2',
  16: '2x2x4',
  32: '2x4x4',
  64: '4x4x4',
  128: '4x4x8',
  256: '4x8x8',
  512: '8x8x8',
  1024: '8x8x16',
  2048: '8x16x16',
}
# Name in an accelerator type -> the generation's name in a topology, what its
# number counts per chip (cores, or chips), and the layouts.
_FAMILIES = {
  'v2': ('v2', 2, _FLAT),
  'v3': ('v3', 2, _FLAT),
  'v4': ('v4', 2, _CUBIC),
  'v5litepod': ('v5e', 1, _FLAT),
  'v5p': ('v5p', 2, _CUBIC),
  'v6e': ('v6e', 1, _FLAT),
  'tpu7x': ('tpu7x', 2, _CUBIC),
}


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """A TPU as Cloud names it.

  Attributes:
    name: such as 'v3-128'.
    devices: number of JAX devices.
    memory: bytes of a device that a program can use.
    topology: its name for `topology.get_pod`, or None for a size whose layout
      is not listed here.
  """

  name: str
  devices: int
  memory: int
  topology: str | None


def parse(name: str) -> Accelerator:
  """Return the TPU of an accelerator type.

  Raises:
    plan_errors.PlanError: if the name is malformed or the generation unknown.

  Examples:
    >>> accelerator = parse('v3-128')
    >>> accelerator.devices, accelerator.topology
    (128, 'v3:8x8')
  """
  match = re.fullmatch(r'(\w+)-([1-9]\d*)', name)
  if not match or match[1] not in _FAMILIES:
    examples = ', '.join(f'{family}-8' for family in _FAMILIES)
    raise plan_errors.PlanError(
      f"'{name}' is not an accelerator type of Cloud TPU. Write one such as "
      f'{examples}.'
    )
  generation, per_chip, layouts = _FAMILIES[match[1]]
  chips, rest = divmod(int(match[2]), per_chip)
  if rest:
    raise plan_errors.PlanError(
      f"'{name}' is not an accelerator type of Cloud TPU: {match[1]} has two "
      'cores per chip. Give an even number of cores.'
    )
  layout = layouts.get(chips)
  hardware = topology.GENERATIONS[generation]
  return Accelerator(
    name,
    devices=chips * hardware.devices_per_chip,
    memory=hardware.memory_bytes,
    topology=layout and f'{generation}:{layout}',
  )
