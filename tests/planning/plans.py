"""A plan with given cycles, bytes and pod."""

import dataclasses
import pathlib

from nfnet_jax.planning import compilation, costs, estimate, topology, workload

TEXT = (pathlib.Path(__file__).parent / 'fixtures' / 'step.hlo').read_text()

FAST_PATHS = {
  'fast_stem': 'fast stem',
  'fused_blocks': 'fused blocks',
  'fast_convs': 'fast convolutions',
  'shard_update': 'sharded update',
}


def make(pod='v3:8x8', devices=128, hosts=16, **changes):
  work = workload.Workload(
    config='f0',
    model='nfnet_f0',
    image_size=192,
    dtype='bfloat16',
    batch=4096,
    steps=112_602,
    examples=1_281_167,
    decoded=2,
    macs=6_980_000_000,
    parameter_bytes=2**28,
    state_bytes=3 * 2**28,
    state_bytes_per_device=3 * 2**28,
    fast_path_titles=FAST_PATHS,
  )
  compiled = compilation.Compiled(
    text=TEXT,
    argument_bytes=9 * 2**30,
    output_bytes=8 * 2**30,
    alias_bytes=7 * 2**30,
    temp_bytes=2 * 2**30,
    code_bytes=2**30,
    flops=1.3e12,
    seconds=80.0,
  )
  pod = topology.Pod(pod, topology.parse(pod), [None] * devices, hosts)
  cost = costs.Schedule(
    cycles=56_400_000,
    categories=[
      costs.Category('convolutions, stem', 10_000_000, 30_000_000),
      costs.Category('copies', 16_400_000, 0),
    ],
    collectives=[costs.Collective('all-reduce', 3, 10**9, 2 * 10**9)],
    unknown_loops=0,
  )
  plan = estimate.Plan(work, pod, 'full', compiled, cost)
  return dataclasses.replace(plan, **changes)
