"""A compiler that replaces libtpu, and pods of CPU devices."""

import pathlib

from nfnet_jax.planning import compilation, plan_errors, topology

TEXT = (pathlib.Path(__file__).parent / 'fixtures' / 'step.hlo').read_text()
GIB = 2**30


class Compiler:
  """Replaces libtpu; a step needs 1 GiB, and 0.5 GiB per image.

  Like libtpu, it accepts some steps that do not fit.
  """

  def __init__(self):
    self.lowered = []

  def compile_step(self, lowered, pod, effort, progress):
    images = lowered.args_info[0][1]['image'].shape
    self.lowered.append((pod, images, effort))
    with progress():
      needed = GIB + images[1] * GIB // 2
    available = topology.parse(pod).memory_bytes
    if needed > 1.2 * available:
      raise plan_errors.DoesNotFitError(needed, available)
    return compilation.Compiled(TEXT, needed, 0, 0, 0, 0, 1e12, 2.0)


def provide(monkeypatch, devices, hosts=2):
  """Provide CPU devices as the pod of any topology."""
  monkeypatch.setattr(
    topology,
    'get_pod',
    lambda name: topology.Pod(name, topology.parse(name), devices, hosts),
  )
