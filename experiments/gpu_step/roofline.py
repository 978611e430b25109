"""What a kernel computes and moves, and the least time that takes on a GPU."""

from collections.abc import Mapping
import math
import re

from nfnet_jax.planning import hlo

# Operations that only move or reinterpret values.
MOVES = {
  'bitcast',
  'broadcast',
  'concatenate',
  'constant',
  'convert',
  'copy',
  'dynamic-slice',
  'dynamic-update-slice',
  'fusion',  # What it contains is counted.
  'get-tuple-element',
  'iota',
  'pad',
  'parameter',
  'reshape',
  'reverse',
  'slice',
  'transpose',
  'tuple',
}
ARRAY = re.compile(r'\b[a-z]+\d*\[([\d,]*)\]')
LABELS = re.compile(r'dim_labels=\w+->(\w+)')
CONTRACTED = re.compile(r'lhs_contracting_dims=\{([\d,]*)\}')
# Scratch memory of cuDNN, the second result of its calls.
WORKSPACE = re.compile(r', u8\[\d+\]\{0\}')


def sizes(shape: str) -> list[int]:
  """Return the dimensions of an array, or of the first one of a tuple."""
  found = ARRAY.search(shape)
  return [int(size) for size in found[1].split(',') if size] if found else [0]


def count_operations(
  program: hlo.Program, ops: Mapping[str, hlo.Op], op: hlo.Op
) -> int:
  """Count additions and multiplications of a kernel.

  Any other function of an element, such as the exponential, counts as one.

  Args:
    program: the compiled step.
    ops: all its operations by name.
    op: a fusion, or a call of cuDNN's convolutions.
  """
  if op.opcode == 'custom-call':
    return _count_convolution(ops, op)
  return sum(_count_fused(ops, inner) for inner in program.inside(op))


def _count_convolution(ops: Mapping[str, hlo.Op], op: hlo.Op) -> int:
  first, second = (sizes(ops[name].shape) for name in op.operands[:2])
  result = sizes(op.shape)
  if 'convBackwardFilter' in op.rest:
    outputs, kernel = second, result
  elif 'convBackwardInput' in op.rest:
    outputs, kernel = first, second
  else:
    outputs, kernel = result, second
  channels = outputs[LABELS.search(op.rest)[1].index('f')]
  return 2 * math.prod(outputs) // channels * math.prod(kernel)


def _count_fused(ops: Mapping[str, hlo.Op], op: hlo.Op) -> int:
  if op.opcode in MOVES:
    return 0
  elements = math.prod(sizes(op.shape))
  if op.opcode == 'dot':
    first = sizes(ops[op.operands[0]].shape)
    axes = CONTRACTED.search(op.rest)[1].split(',')
    return 2 * elements * math.prod(first[int(axis)] for axis in axes)
  if op.opcode == 'reduce':
    return math.prod(sizes(ops[op.operands[0]].shape))
  return elements


def count_bytes(ops: Mapping[str, hlo.Op], op: hlo.Op) -> int:
  """Count the bytes of arguments and results, each read or written once."""
  shapes = [ops[name].shape for name in op.operands if name in ops]
  results = op.shape
  if op.opcode == 'custom-call':
    results = WORKSPACE.sub('', results)
  return sum(map(hlo.num_bytes, [*shapes, results]))


def least_ms(
  operations: float,
  moved: float,
  is_product: bool,
  tflops: float,
  tbytes: float,
) -> float:
  """Return the least milliseconds of a kernel at the rates of the GPU.

  Args:
    operations: what it computes.
    moved: bytes that it reads and writes.
    is_product: whether the units for products of matrices compute it. What
      other kernels compute is not limited by that rate, and is ignored.
    tflops: 1e12 operations per second of these units.
    tbytes: 1e12 bytes per second of the GPU's memory.
  """
  computed = operations / tflops if is_product else 0
  return max(computed, moved / tbytes) / 1e9
