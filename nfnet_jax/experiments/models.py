"""Print the table of models: sizes, costs, and reported accuracies.

  python -m nfnet_jax.experiments.models 'nfnet_f?'

lists the models whose names match, without a pattern all. Multiply-adds are
those of one image at the test size. `--json` prints one object, name -> row.
"""

from __future__ import annotations

import fnmatch
import json
from typing import Any

from absl import flags

from nfnet_jax import errors
from nfnet_jax.cli import command, common_flags

flags.declare_key_flag('json')


def main(pattern: str = '*') -> None:
  """Print a row for each model whose name matches a pattern."""
  from nfnet_jax.models import registry

  names = fnmatch.filter(registry.list_models(), pattern)
  if not names:
    known = registry.list_models()
    raise errors.InputError(
      f"No model matches '{pattern}'.{errors.did_you_mean(pattern, known)} "
      f"'*' matches all {len(known)}."
    )
  if common_flags.JSON.value:
    print(json.dumps({name: _row(name) for name in names}))
    return
  print(
    f'{"model":<26}{"parameters":>13}{"G mult-adds":>13}{"train":>7}{"test":>6}'
    '  reported top-1'
  )
  for row in map(_row, names):
    reported = row['reported_top1'] and (
      f'{row["reported_top1"]} % ({row["source"]})'
    )
    print(
      f'{row["name"]:<26}{row["parameters"]:>13,}{row["macs"] / 1e9:>13.3f}'
      f'{row["train_size"]:>7}{row["test_size"]:>6}  {reported or "-"}'
    )


def _row(name: str) -> dict[str, Any]:
  from nfnet_jax.models import complexity, registry

  spec = registry.get_model_spec(name)
  parameters, macs = complexity.count_model(name)
  return {
    'name': name,
    'parameters': parameters,
    'macs': macs,
    'train_size': spec.train_size,
    'test_size': spec.test_size,
    'reported_top1': spec.reported_top1,
    'source': spec.source,
  }


if __name__ == '__main__':
  command.run(main, takes='[PATTERN]')
