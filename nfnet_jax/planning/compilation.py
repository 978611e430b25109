"""Compiles a step for a pod, once: programs are kept by what they are."""

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
import zlib

import jax

from nfnet_jax.planning import plan_errors
from nfnet_jax.storage import files

# Effort -> how XLA calls it; None is its default.
EFFORTS = {'full': None, 'quick': 'O1'}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler made of a program, on each device.

  Attributes:
    text: the scheduled program.
    argument_bytes: of what the program is given.
    output_bytes: of what it returns.
    alias_bytes: of outputs that take an argument's place.
    temp_bytes: of everything in between, at its peak.
    code_bytes: of the program itself.
    flops: of a step; loop bodies count once.
    seconds: that it took to compile.
    cached: whether it was compiled before.
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
  watch: Callable[[], contextlib.AbstractContextManager] = (
    contextlib.nullcontext
  ),
) -> Compiled:
  """Compiles a lowered step, or finds what was compiled before.

  Args:
    lowered: the step, lowered for the pod's devices.
    pod: name of the topology.
    effort: 'full' as for training; 'quick' in a third of the time, with the
      same memory and more cycles.
    watch: makes the context in which the compiler runs, to show that it does.

  Raises:
    plan_errors.DoesNotFitError: if a device has too little memory.
  """
  name = f'{_key(lowered, pod, effort)}.json.gz'
  path = files.cache_folder('plans') / name
  found = _read(path)
  if found is None:
    with watch():
      found = _compile(lowered, effort)
    _write(path, found)
  if 'needed' in found:
    raise plan_errors.DoesNotFitError(found['needed'], found['available'])
  return Compiled(**found)


def versions() -> dict[str, str]:
  """Returns the versions that a compiled program depends on."""
  return {
    name: importlib.metadata.version(name)
    for name in ('jax', 'jaxlib', 'libtpu')
  }


def _key(lowered: jax.stages.Lowered, pod: str, effort: str) -> str:
  """Hashes the program, its scopes' names included."""
  program = without_places(lowered.as_text(debug_info=True))
  parts = json.dumps([pod, effort, versions()]) + program
  return hashlib.sha256(parts.encode()).hexdigest()


def without_places(program: str) -> str:
  """Replaces the places in files that a program came from by scopes' names.

  Example:
    >>> print(without_places('''%0 = stablehlo.sine %arg0 loc(#loc2)
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


def _compile(lowered: jax.stages.Lowered, effort: str) -> dict:
  start = time.perf_counter()
  try:
    with _effort(effort), plan_errors.of_compiler():
      compiled = lowered.compile()
  except plan_errors.DoesNotFitError as error:
    return {'needed': error.needed, 'available': error.available}
  seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  return {
    'text': compiled.as_text(),
    'argument_bytes': memory.argument_size_in_bytes,
    'output_bytes': memory.output_size_in_bytes,
    'alias_bytes': memory.alias_size_in_bytes,
    'temp_bytes': memory.temp_size_in_bytes,
    'code_bytes': memory.generated_code_size_in_bytes,
    'flops': compiled.cost_analysis()['flops'],
    'seconds': seconds,
  }


@contextlib.contextmanager
def _effort(effort: str) -> Iterator[None]:
  before = jax.config.jax_optimization_level
  try:
    if EFFORTS[effort]:
      jax.config.update('jax_optimization_level', EFFORTS[effort])
    yield
  finally:
    jax.config.update('jax_optimization_level', before)


def _read(path: pathlib.Path) -> dict | None:
  """Reads a kept result; one that is damaged counts as missing."""
  try:
    found = json.loads(gzip.decompress(path.read_bytes()))
  except (OSError, EOFError, ValueError, zlib.error):
    return None
  return found if 'needed' in found else {**found, 'cached': True}


def _write(path: pathlib.Path, found: dict) -> None:
  # A cache that cannot be written is no reason to lose the plan.
  with contextlib.suppress(OSError):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f'.{os.getpid()}')
    temporary.write_bytes(gzip.compress(json.dumps(found).encode()))
    temporary.replace(path)
