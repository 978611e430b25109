"""Export weights as a program that runs without this package.

  python -m nfnet_jax.experiments.export --weights=PATH --out=DIR

folds weight standardisation and batch normalisation into plain kernels and
biases, and writes to DIR, which is new, empty, or holds an earlier export:

  model.stablehlo  `(weights, images) -> probabilities [N, classes]`, serialised
                   by `jax.export` for cpu, cuda and tpu; images are float
                   pixels 0..255 `[N, size, size, 3]`, for any N
  weights.npz      its first argument: flat names -> float32 arrays
  model.json       what to feed it: size, crop, margin, class names; versions
  saved_model/     with `--saved_model`: the same as a TensorFlow SavedModel
  onnx/            with `--onnx`: model.onnx, the same from `images` to
                   `probabilities`

docs/export.md has a program that loads them. `--json` prints one object.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import pathlib
import shutil
from typing import Any, TYPE_CHECKING

from absl import flags

from nfnet_jax import errors
from nfnet_jax.cli import command, common_flags

if TYPE_CHECKING:
  import jax.export

  from nfnet_jax.export import fold
  from nfnet_jax.weights import network

for _name in ('weights', 'timm_forward', 'size', 'out', 'json'):
  flags.declare_key_flag(_name)
_SAVED_MODEL = flags.DEFINE_bool(
  'saved_model', False, 'Also write a TensorFlow SavedModel.'
)

_ONNX = flags.DEFINE_bool('onnx', False, 'Also write an ONNX model.')

_FILES = ('model.stablehlo', 'weights.npz', 'model.json')
# Largest difference that folding may make, divided by the largest logit.
_TOLERANCE = 1e-5


def main() -> None:
  """Export `--weights` to the folder `--out`."""
  if _SAVED_MODEL.value:
    from nfnet_jax.export import saved_model

    with errors.as_input_error():
      saved_model.check()
  if _ONNX.value:
    with errors.naming_extras():
      import onnxruntime  # noqa: F401
  weights = common_flags.get_weights()
  out = _get_empty_out()
  folded, difference = _fold(weights)
  facts = _write(out, weights, folded)
  _print_report(out, facts, folded, difference)


def _get_empty_out() -> pathlib.Path:
  """Return the folder of `--out`, which may hold only an earlier export."""
  out = common_flags.get_out()
  folders = {'saved_model': _SAVED_MODEL.value, 'onnx': _ONNX.value}
  names = {*_FILES, *(name for name, wanted in folders.items() if wanted)}
  known = {f'{name}.tmp' for name in (*_FILES, *folders)}
  with errors.as_input_error(OSError):
    found = {path.name for path in out.iterdir()}
  if 'model.json' in found:
    known |= names
  if others := found - known:
    raise errors.InputError(
      f"--out='{out}' holds '{min(others)}'; give a new or an empty folder."
    )
  return out


def _fold(weights: network.Weights) -> tuple[fold.Folded, float]:
  """Return the folded network, and the largest change of its logits.

  Raises:
    errors.InputError: if the change is more than that of rounding.
  """
  from nfnet_jax.export import fold

  network = weights.create(), weights.params, weights.model_state
  folded = fold.fold(*network)
  difference = fold.difference(*network, folded, weights.preprocessing.size)
  if not difference <= _TOLERANCE:  # True for NaN, too.
    raise errors.InputError(
      f'Folding changes the logits by {difference:.1e} of the largest, more '
      f'than {_TOLERANCE:.0e}: these weights are not exported.'
    )
  return folded, difference


def _write(
  out: pathlib.Path, weights: network.Weights, folded: fold.Folded
) -> dict[str, Any]:
  """Write all files or, if one fails, none; return what model.json holds."""
  import numpy as np

  from nfnet_jax.export import stablehlo
  from nfnet_jax.storage import files

  predict = stablehlo.predictor(folded)
  arrays: dict[str, Any] = stablehlo.flatten(folded.params)
  exported = stablehlo.program(predict, arrays, weights.preprocessing.size)
  facts = _facts(weights, exported)
  with contextlib.ExitStack() as stack:
    program, archive, description = (
      stack.enter_context(files.atomically(out / name)) for name in _FILES
    )
    program.write_bytes(exported.serialize())
    with archive.open('wb') as file:
      np.savez(file, **arrays)
    description.write_text(json.dumps(facts, indent=2))
    if _SAVED_MODEL.value:
      from nfnet_jax.export import saved_model

      folder = stack.enter_context(_replacing(out / 'saved_model'))
      saved_model.save(folder, predict, arrays, weights.preprocessing.size)
    if _ONNX.value:
      from nfnet_jax.export import onnx_file

      folder = stack.enter_context(_replacing(out / 'onnx'))
      with errors.as_input_error():
        onnx_file.save(folder, predict, arrays, weights.preprocessing.size)
  return facts


def _facts(
  weights: network.Weights, exported: jax.export.Exported
) -> dict[str, Any]:
  """Return what a user of the program has to know."""
  import jax

  import nfnet_jax

  return {
    'model': weights.model,
    **dataclasses.asdict(weights.preprocessing),
    'class_names': list(weights.class_names),
    'platforms': list(exported.platforms),
    'calling_convention_version': exported.calling_convention_version,
    'jax_version': jax.__version__,
    'nfnet_jax_version': nfnet_jax.__version__,
  }


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yield a temporary name for a folder that then replaces another."""
  temporary = path.with_name(f'{path.name}.tmp')
  shutil.rmtree(temporary, ignore_errors=True)
  try:
    yield temporary
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise
  shutil.rmtree(path, ignore_errors=True)
  temporary.replace(path)


def _print_report(
  out: pathlib.Path,
  facts: dict[str, Any],
  folded: fold.Folded,
  difference: float,
) -> None:
  from nfnet_jax.models import complexity

  sizes = {path.name: _count_bytes(path) for path in sorted(out.iterdir())}
  report = {
    'model': facts['model'],
    'size': facts['size'],
    'parameters': complexity.count_parameters(folded.params),
    'standardized': len(folded.standardized),
    'merged': len(folded.merged),
    'kept': len(folded.kept),
    'difference': difference,
    'files': sizes,
  }
  if common_flags.JSON.value:
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
  for name, size in sizes.items():
    print(f'{size:>13,}  {out / name}')


def _count_bytes(path: pathlib.Path) -> int:
  if path.is_dir():
    return sum(_count_bytes(inner) for inner in path.iterdir())
  return path.stat().st_size


if __name__ == '__main__':
  command.run(main)
