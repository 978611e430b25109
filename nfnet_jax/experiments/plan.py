"""Plan a training run for a TPU pod without one: memory, step time, schedule.

  python -m nfnet_jax.experiments.plan --config=f3 --topology=v3:8x8

compiles the training step of the config for that pod with the real TPU compiler
(`pip install '.[plan]'`), which takes minutes. It prints the memory,
the compiler's own estimate of the step, the throughput and schedule that
result, and the cycles by category. If the step does not fit, it searches for
the largest batch that does. The dataset need not exist. `--quick` compiles in
less time: memory is the same, cycles are pessimistic. With
`--compare=f1,2048,v3:4x8` each further plan differs from the first in a config,
batch size or topology. `--json` prints one object; with `--compare` it holds a
list, `plans`. `--out` also writes plan.png, and collectives.png, which shows
when the devices send what they have computed. `--search` looks for the fastest
microbatches, recomputation and fast paths that fit, for each config, batch size
and topology given. Compiled programs are cached in ~/.cache, so that a search
goes on where it was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import functools
import json
import re
from typing import TYPE_CHECKING

from absl import flags
import ml_collections

from nfnet_jax import errors
from nfnet_jax.cli import command, common_flags, config_flag, planners
from nfnet_jax.config import lookup

if TYPE_CHECKING:
  from nfnet_jax.planning import planner as planner_lib
  from nfnet_jax.planning import search as search_lib

_Variant = tuple[str, ml_collections.ConfigDict, str]

for _name in (*config_flag.FLAGS, *planners.FLAGS, 'json', 'out'):
  flags.declare_key_flag(_name)
_TOPOLOGY = flags.DEFINE_string(
  'topology', None, 'Pod: GENERATION:LAYOUT in chips, such as v3:8x8.'
)
_QUICK = flags.DEFINE_bool(
  'quick', False, 'Compiles in less time, with pessimistic cycles.'
)
_COMPARE = flags.DEFINE_list(
  'compare', [], 'Configs, batch sizes and topologies to compare with.'
)
_SEARCH = flags.DEFINE_bool(
  'search',
  False,
  'Searches for the fastest microbatches, recomputation and fast paths.',
)


def main() -> None:
  """Print the plan of `--config` on `--topology`, or a comparison."""
  import jax

  from nfnet_jax.planning import figures, plan_errors, report

  # Compiling needs no accelerator, and must not occupy one.
  jax.config.update('jax_platforms', 'cpu')

  if not _TOPOLOGY.value:
    raise errors.InputError(
      'The pod is missing. Give its topology: --topology=v3:8x8.'
    )
  effort = 'quick' if _QUICK.value else 'full'
  with errors.as_input_error(plan_errors.PlanError):
    # All input is checked before anything is compiled.
    variants = list(_variants(_TOPOLOGY.value))
    made = [planners.make(*variant) for variant in variants]
    out = common_flags.get_out() if common_flags.OUT.present else None
    if _SEARCH.value:
      trials = _search(variants, made)
      plans = [trial.plan for trial in trials]
    else:
      plans = [planner.plan(effort) for planner in made]
  if common_flags.JSON.value:
    rows = [plan.numbers() for plan in plans]
    several = _COMPARE.value or _SEARCH.value
    print(json.dumps({'plans': rows} if several else rows[0]))
  elif _SEARCH.value:
    print(report.ranking(trials))
  elif _COMPARE.value:
    print(report.comparison(plans))
  else:
    print(report.summary(plans[0]))
  if out:
    path = out / 'plan.png'
    figures.draw_cycles(plans, path)
    command.log(str(path))
    path = out / 'collectives.png'
    if figures.draw_collectives(plans, path):
      command.log(str(path))


def _search(
  variants: Sequence[_Variant], made: Sequence[planner_lib.Planner]
) -> list[search_lib.Trial]:
  """Search for the fastest step of each variant; return the fastest first.

  Raises:
    errors.InputError: if no step fits.
  """
  from nfnet_jax.config import fast_paths
  from nfnet_jax.planning import search

  found = []
  for variant, first in zip(variants, made):
    make = functools.partial(_make, *variant)
    searching = search.Search(make, fast_paths.FAST_PATHS, command.log)
    start = search.Choice(1, False, first.workload.fast_paths)
    found += searching.run(start, full=not _QUICK.value)
  if not found:
    raise errors.InputError(
      'No step fits, with any number of microbatches and recomputed blocks. '
      'Use a smaller batch, or a topology with more devices.'
    )
  return sorted(found, key=lambda trial: trial.cost)


def _make(
  name: str,
  config: ml_collections.ConfigDict,
  topology: str,
  choice: search_lib.Choice,
) -> planner_lib.Planner:
  """Return the planner of a variant with the settings of a choice."""
  config = config.copy_and_resolve_references()
  config.run.update(choice.overrides())
  return planners.make(name, config, topology)


def _variants(topology: str) -> Iterator[_Variant]:
  """Yield a config's name, config and topology, then those of `--compare`."""
  base_name, base_config = config_flag.get_name(), config_flag.get_config()
  yield base_name, base_config, topology
  for item in _COMPARE.value:
    if re.fullmatch(r'\d+', item):
      config = base_config.copy_and_resolve_references()
      config.batch_size = int(item)
      yield base_name, config, topology
    elif re.fullmatch(r'(v\d|tpu)\w*:[\dx]+', item):
      yield base_name, base_config, item
    else:
      yield item, lookup.load(item, config_flag.get_overrides()), topology


if __name__ == '__main__':
  command.run(main)
