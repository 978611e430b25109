"""TPU pods by name: the devices of a topology such as 'v3:8x8'.

The numbers are those of Jouppi et al., "A domain-specific supercomputer for
training deep neural networks" (CACM 63:7, 2020; v2 and v3), Jouppi et al., "TPU
v4" (ISCA 2023), and Google Cloud's pages on each generation. Where no clock is
published it is derived from the peak: v5e and v5p have four units of 128 x 128
multiply-adds per core. Memory is what libtpu 0.0.42.1 leaves to a program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from nfnet_jax.planning import plan_errors

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Generation:
  """A generation of TPUs; JAX devices are its cores or its whole chips.

  Attributes:
    chip: name of its chips.
    devices_per_chip: two on v2, v3 and TPU7x, where each core is a device.
    memory: GiB per device that a program can use.
    peak: bfloat16 FLOPs per second and device.
    clock: Hz, or None where it is not known.
    links: bytes per second that a chip can send over all its links together.
    options: additional arguments that libtpu needs for a topology.
  """

  chip: str
  devices_per_chip: int
  memory: float
  peak: float
  clock: float | None
  links: float
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def memory_bytes(self) -> int:
    """Bytes per device that a program can use."""
    return int(self.memory * GIB)

  @property
  def device(self) -> str:
    """The hardware of one JAX device: 'core' or 'chip'."""
    return 'core' if self.devices_per_chip > 1 else 'chip'


# On Cloud's v4 VMs a chip's two cores are one device.
_MEGACORE = {'chip_config_name': 'megacore'}
GENERATIONS: dict[str, Generation] = {
  'v2': Generation('TPU v2', 2, 7.48, 23e12, 700e6, 4 * 62e9),
  'v3': Generation('TPU v3', 2, 15.48, 61.5e12, 940e6, 4 * 82e9),
  'v4': Generation('TPU v4', 1, 30.75, 275e12, 1050e6, 6 * 50e9, _MEGACORE),
  'v5e': Generation('TPU v5e', 1, 15.75, 197e12, 1503e6, 200e9),
  'v5p': Generation('TPU v5p', 1, 95.74, 459e12, 1751e6, 600e9),
  'v6e': Generation('TPU v6e', 1, 31.25, 918e12, None, 448e9),
  'tpu7x': Generation('TPU7x', 2, 94.75, 1153.5e12, None, 600e9),
}
# Without these variables libtpu waits minutes for a metadata server that exists
# only on Cloud's machines, and logs long warnings. The accelerator type has no
# effect.
_ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_ACCELERATOR_TYPE': 'v3-8',
}
EXAMPLES = (
  'v2:4x4, v3:2x2, v3:8x8, v4:4x4x4, v5e:16x16, v5p:4x4x4, v6e:16x16, '
  'tpu7x:2x2x1'
)
_NAME = re.compile(r'(\w+):(\d+(?:x\d+)+)')


@dataclasses.dataclass(frozen=True)
class Pod:
  """A topology and its devices, for which JAX can compile.

  Attributes:
    name: such as 'v3:8x8'.
    generation: the generation of its TPUs.
    devices: the devices to compile for, in JAX's order.
    hosts: number of machines that hold them.
  """

  name: str
  generation: Generation
  devices: Sequence[jax.Device]
  hosts: int

  @property
  def chips(self) -> int:
    """Number of chips."""
    return len(self.devices) // self.generation.devices_per_chip


def parse(name: str) -> Generation:
  """Return the generation that a topology's name starts with.

  Needs no libtpu, and so does not check whether the layout exists.

  Raises:
    plan_errors.PlanError: if the name is malformed or the generation unknown.

  Examples:
    >>> parse('v3:8x8').chip
    'TPU v3'
  """
  match = _NAME.fullmatch(name)
  if not match:
    raise plan_errors.PlanError(
      f"'{name}' is not a topology. Write GENERATION:LAYOUT in chips, such as "
      f'{EXAMPLES}.'
    )
  if match[1] not in GENERATIONS:
    near = difflib.get_close_matches(match[1], GENERATIONS, n=1)
    hint = f" Did you mean '{near[0]}:{match[2]}'?" if near else ''
    raise plan_errors.PlanError(
      f"Unknown TPU '{match[1]}' in topology '{name}'.{hint} Known: "
      f'{", ".join(GENERATIONS)}.'
    )
  return GENERATIONS[match[1]]


def get_pod(name: str) -> Pod:
  """Ask libtpu for a topology; no TPU is needed.

  Raises:
    plan_errors.PlanError: if there is no such topology, if libtpu is not
      installed, or if another process holds it.
  """
  generation = parse(name)
  for variable, value in _ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  with plan_errors.translate_libtpu_errors(name):
    description = topologies.get_topology_desc(
      platform='tpu', topology_name=name, **generation.options
    )
    devices: Sequence[jax.Device] = description.devices
  hosts = len({device.process_index for device in devices})
  return Pod(name, generation, devices, hosts)
