"""Compile a step for a pod, and cache the results on disk by program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import time
from typing import Any
import zlib

import jax

from nfnet_jax.planning import plan_errors
from nfnet_jax.storage import files

# Variables with flags of the compiler.
_COMPILER_OPTIONS = 'XLA_FLAGS', 'LIBTPU_INIT_ARGS'
# Effort -> XLA's optimisation level; None is its default.
EFFORTS: dict[str, str | None] = {'full': None, 'quick': 'O1'}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled program, and what it needs on each device.

  Attributes:
    text: the scheduled program (HLO).
    argument_bytes: size of the program's arguments.
    output_bytes: size of its results.
    alias_bytes: size of the results that reuse the memory of an argument.
    temp_bytes: peak size of all temporary values.
    code_bytes: size of the program itself.
    flops: operations per step; loop bodies count once.
    seconds: compilation time.
    cached: whether the result was read from the cache.
  """

  text: str
  argument_bytes: int
  output_bytes: int
  alias_bytes: int
  temp_bytes: int
  code_bytes: int
  flops: float
  seconds: float
  cached: bool = False

  @property
  def peak_bytes(self) -> int:
    """The largest memory that the program needs, in bytes."""
    return (
      self.argument_bytes
      + self.output_bytes
      - self.alias_bytes
      + self.temp_bytes
      + self.code_bytes
    )


def compile_step(
  lowered: jax.stages.Lowered,
  pod: str,
  effort: str = 'full',
  progress: Callable[[], contextlib.AbstractContextManager] = (
    contextlib.nullcontext
  ),
) -> Compiled:
  """Compile a lowered step, or read the result from the cache.

  Args:
    lowered: the step, lowered for the pod's devices.
    pod: name of the topology.
    effort: 'full' as for training; 'quick' takes a third of the time, with the
      same memory and more cycles.
    progress: returns the context manager in which the compiler runs, which may
      show progress. Not called if the result is in the cache.

  Raises:
    plan_errors.DoesNotFitError: if a device has too little memory.
  """
  name = f'{_key(lowered, pod, effort)}.json.gz'
  path = files.cache_folder('plans') / name
  found = _read(path)
  if found is None:
    with progress():
      found = _compile(lowered, effort)
    _write(path, found)
  if 'needed' in found:
    raise plan_errors.DoesNotFitError(found['needed'], found['available'])
  return Compiled(**found)


def versions() -> dict[str, str]:
  """Return the versions that a compiled program depends on."""
  return {
    name: importlib.metadata.version(name)
    for name in ('jax', 'jaxlib', 'libtpu')
  }


def _key(lowered: jax.stages.Lowered, pod: str, effort: str) -> str:
  """Hash the program, its scope names and what else the result depends on."""
  program = replace_locations(lowered.as_text(debug_info=True))
  options = {name: os.environ.get(name) for name in _COMPILER_OPTIONS}
  text = json.dumps([pod, effort, versions(), options]) + program
  return hashlib.sha256(text.encode()).hexdigest()


def replace_locations(program: str) -> str:
  """Replace the source locations in a program's text by the scope names.

  Examples:
    >>> print(replace_locations('''%0 = stablehlo.sine %arg0 loc(#loc2)
    ... #loc1 = loc("model.py":7:3)
    ... #loc2 = loc("jit(f)/block/sin"(#loc1))'''))
    %0 = stablehlo.sine %arg0 loc(jit(f)/block/sin)
  """
  names = dict(re.findall(r'^(#loc\d*) = loc\("([^"]*)"\(', program, re.M))
  program = re.sub(r'^#loc.*\n?', '', program, flags=re.M)
  program = re.sub(
    r'loc\((#loc\d*)\)',
    lambda match: f'loc({names.get(match[1], "")})',
    program,
  )
  return re.sub(r'#loc\d*', '', program).strip()


def _compile(lowered: jax.stages.Lowered, effort: str) -> dict[str, Any]:
  """Return the fields of a `Compiled`, or of a `DoesNotFitError`."""
  start = time.perf_counter()
  try:
    with _effort(effort), plan_errors.translate_compiler_errors():
      compiled = lowered.compile()
  except plan_errors.DoesNotFitError as error:
    return {'needed': error.needed, 'available': error.available}
  seconds = time.perf_counter() - start
  memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
  assert memory is not None  # The TPU compiler provides both.
  assert costs is not None
  return {
    'text': compiled.as_text(),
    'argument_bytes': memory.argument_size_in_bytes,
    'output_bytes': memory.output_size_in_bytes,
    'alias_bytes': memory.alias_size_in_bytes,
    'temp_bytes': memory.temp_size_in_bytes,
    'code_bytes': memory.generated_code_size_in_bytes,
    'flops': costs['flops'],
    'seconds': seconds,
  }


@contextlib.contextmanager
def _effort(effort: str) -> Iterator[None]:
  before = jax.config.jax_optimization_level  # type: ignore[attr-defined]
  try:
    if EFFORTS[effort]:
      jax.config.update('jax_optimization_level', EFFORTS[effort])
    yield
  finally:
    jax.config.update('jax_optimization_level', before)


def _read(path: pathlib.Path) -> dict[str, Any] | None:
  """Read a cached result; a damaged file counts as missing."""
  try:
    found = json.loads(gzip.decompress(path.read_bytes()))
  except (OSError, EOFError, ValueError, zlib.error):
    return None
  return found if 'needed' in found else {**found, 'cached': True}


def _write(path: pathlib.Path, found: dict[str, Any]) -> None:
  # If the cache cannot be written, the plan still continues.
  with contextlib.suppress(OSError):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f'.{os.getpid()}')
    temporary.write_bytes(gzip.compress(json.dumps(found).encode()))
    temporary.replace(path)
