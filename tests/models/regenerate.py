"""Write rows of `nfnet_jax/models/structure.json` again, from today's models.

  python -m tests.models.regenerate nf_regnet_b0 'efficientnet_*'

Names are registry names or patterns of them; without any, all rows are written.
Rows of models that are gone are removed. Look at the difference before you
commit it: published weights need the old structure.
"""

import fnmatch
import functools
import hashlib
import json
import pathlib
import sys

import jax

from nfnet_jax import trees
from nfnet_jax.models import complexity, registry

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'


trace = functools.cache(complexity.trace_model)


def describe(name):
  """Return a model's row of the golden file."""
  params, state, macs = trace(name)
  spec = registry.get_model_spec(name)
  listing = [
    f'{path} {list(leaf.shape)} {leaf.dtype}'
    for path, leaf in trees.named_leaves(params) + trees.named_leaves(state)
  ]
  return {
    'leaves': len(jax.tree.leaves(params)),
    'parameters': complexity.count_parameters(params),
    'macs_at_test_size': macs,
    'train_size': spec.train_size,
    'test_size': spec.test_size,
    'sha256_of_paths_and_shapes': hashlib.sha256(
      '\n'.join(listing).encode()
    ).hexdigest(),
  }


def read_golden():
  """Return the rows of the golden file by model."""
  return json.loads(complexity.STRUCTURE.read_text())


def regenerate(patterns, path=complexity.STRUCTURE):
  """Write the rows of some models again, in the order of the registry."""
  golden = json.loads(path.read_text())
  names = registry.list_models()
  for pattern in patterns:
    if not fnmatch.filter(names, pattern):
      raise SystemExit(f"No model matches '{pattern}'.")
  rows = {
    name: describe(name)
    if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    else golden[name]
    for name in names
    if name in golden or any(fnmatch.fnmatch(name, p) for p in patterns)
  }
  path.write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
  regenerate(sys.argv[1:] or ['*'])
