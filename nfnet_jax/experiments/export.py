"""Exports weights as a program that runs without this package.

  python -m nfnet_jax.experiments.export --weights=PATH --out=DIR

folds weight standardisation and batch normalisation into plain kernels and
biases, and writes to DIR, a new or an empty folder or that of an earlier
export:

  model.stablehlo  `(weights, images) -> probabilities [N, classes]`, serialised
                   by `jax.export` for cpu, cuda and tpu; images are float
                   pixels 0..255 `[N, size, size, 3]`, of any N
  weights.npz      its first argument: flat names -> float32 arrays
  model.json       what to feed it: size, crop, margin, class names; versions
  saved_model/     with `--saved_model`: the same as a TensorFlow SavedModel

The README has a program that loads them. `--json` prints one object.
"""

from collections.abc import Callable
import json
import pathlib
import shutil
import tempfile

from absl import flags

from nfnet_jax.experiments import cli, errors

for _name in ('weights', 'timm_forward', 'size', 'out', 'json'):
  flags.declare_key_flag(_name)
_SAVED_MODEL = flags.DEFINE_bool(
  'saved_model', False, 'Writes a TensorFlow SavedModel, too.'
)

_FILES = ('model.stablehlo', 'weights.npz', 'model.json')
# Largest difference that folding may make, over the largest logit.
_TOLERANCE = 1e-5


def main() -> None:
  from nfnet_jax.weights import fold, portable

  out = _get_empty_out()
  if _SAVED_MODEL.value:
    from nfnet_jax.weights import saved_model

    with errors.as_input_error():
      saved_model.check()
  weights = cli.get_weights()
  model = weights.create()
  network = model, weights.params, weights.model_state
  folded = fold.fold(*network)
  difference = fold.difference(*network, folded, weights.size)
  if not difference <= _TOLERANCE:  # NaN, too.
    raise errors.InputError(
      f'Folding changes the logits by {difference:.1e} of the largest, more '
      f'than {_TOLERANCE:.0e}: these weights are not exported.'
    )
  predict = portable.predictor(folded)
  arrays = portable.flatten(folded.params)
  exported = portable.program(predict, arrays, weights.size)
  facts = _facts(weights, exported)
  writers = {
    'model.stablehlo': lambda path: path.write_bytes(exported.serialize()),
    'weights.npz': lambda path: _save_arrays(path, arrays),
    'model.json': lambda path: path.write_text(json.dumps(facts, indent=2)),
  }
  if _SAVED_MODEL.value:
    writers['saved_model'] = lambda path: saved_model.save(
      path, predict, arrays, weights.size
    )
  _write(out, writers)
  _report(out, facts, folded, difference)


def _get_empty_out() -> pathlib.Path:
  """Returns the folder of `--out`, if it holds an earlier export at most."""
  out = cli.get_out()
  names = {*_FILES, *(['saved_model'] if _SAVED_MODEL.value else [])}
  known = {f'{name}.tmp' for name in names}
  with errors.as_input_error(OSError):
    held = {path.name for path in out.iterdir()}
    tempfile.TemporaryFile(dir=out).close()
  if 'model.json' in held:
    known |= names
  if others := held - known:
    raise errors.InputError(
      f"--out='{out}' holds '{min(others)}'; give a new or an empty folder."
    )
  return out


def _facts(weights, exported) -> dict:
  """Returns what the consumer of the program has to know."""
  import jax

  import nfnet_jax

  return {
    'model': weights.model,
    'size': weights.size,
    'crop': weights.crop,
    'margin': weights.margin,
    'class_names': list(weights.class_names),
    'platforms': list(exported.platforms),
    'calling_convention_version': exported.calling_convention_version,
    'jax_version': jax.__version__,
    'nfnet_jax_version': nfnet_jax.__version__,
  }


def _save_arrays(path: pathlib.Path, arrays: dict) -> None:
  import numpy as np

  with path.open('wb') as file:
    np.savez(file, **arrays)


def _write(
  out: pathlib.Path, writers: dict[str, Callable[[pathlib.Path], object]]
) -> None:
  """Writes all files under temporary names, then renames them."""
  for name, write in writers.items():
    temporary = out / f'{name}.tmp'
    if temporary.is_dir():
      shutil.rmtree(temporary)
    write(temporary)
  for name in writers:
    if (out / name).is_dir():  # A rename replaces files only.
      shutil.rmtree(out / name)
    (out / f'{name}.tmp').replace(out / name)


def _report(out: pathlib.Path, facts: dict, folded, difference: float) -> None:
  from nfnet_jax.models import complexity

  report = {
    'model': facts['model'],
    'size': facts['size'],
    'parameters': complexity.count_parameters(folded.params),
    'standardized': len(folded.standardized),
    'merged': len(folded.merged),
    'kept': len(folded.kept),
    'difference': difference,
    'files': {path.name: _bytes(path) for path in sorted(out.iterdir())},
  }
  if cli.JSON.value:
    print(json.dumps(report))
    return
  print(
    f'model       {report["model"]}: {report["parameters"]:,} parameters at '
    f'{report["size"]} px\n'
    f'folded      {report["standardized"]} standardised kernels; '
    f'{report["merged"]} batch norms into convolutions, {report["kept"]} left '
    'as scale and offset\n'
    f'difference  {difference:.1e} of the largest logit, on random images\n'
    f'program     {", ".join(facts["platforms"])}; jax {facts["jax_version"]}, '
    f'calling convention {facts["calling_convention_version"]}'
  )
  for name, size in report['files'].items():
    print(f'{size:>13,}  {out / name}')


def _bytes(path: pathlib.Path) -> int:
  if path.is_dir():
    return sum(_bytes(inner) for inner in path.iterdir())
  return path.stat().st_size


if __name__ == '__main__':
  cli.run(main)
