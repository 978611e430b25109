"""Evaluates a run's latest checkpoint, raw and averaged weights.

  python -m nfnet_jax.experiments.evaluate --workdir=/tmp/digits
"""

import json
import pathlib

from absl import flags

from nfnet_jax.experiments import cli
from nfnet_jax.experiments import errors

_WORKDIR = flags.DEFINE_string('workdir', None, 'The run to evaluate.')
_JSON = flags.DEFINE_bool('json', False, 'Prints one JSON object.')


def main() -> None:
  from nfnet_jax.experiments import assemble
  from nfnet_jax.experiments import config as config_lib
  from nfnet_jax.training import checkpoint

  if not _WORKDIR.value:
    raise errors.InputError('Say which run: --workdir=DIR.')
  workdir = pathlib.Path(_WORKDIR.value).resolve()
  config = assemble.resolve_and_check(config_lib.load(workdir))
  experiment = assemble.Experiment.open(config)
