"""Convert NFNets to timm's names and layouts, and back.

timm has the published networks as `dm_nfnet_f0` to `dm_nfnet_f6`, and its own
light ones, `nfnet_l0` and `eca_nfnet_l0` to `l3`. Its kernels have the output
channels first, its gains are `[O, 1, 1, 1]`, and its squeeze-excite is made of
1x1 convolutions. Outputs of `dm_nfnet_*` differ slightly: timm computes GELU
exactly, and adds 1e-5 to the variance of each kernel where the published
networks have a lower bound. The option `timm_forward` of `models.nfnet.NFNet`
computes as timm does; `models.light_nfnet.LightNFNet` always does.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
import re

import numpy as np

from nfnet_jax.models import light_nfnet, nfnet

Arrays = Mapping[str, np.ndarray]
Tree = Mapping[str, Mapping[str, np.ndarray]]

# The families that timm has.
FAMILIES = nfnet.NFNet, light_nfnet.LightNFNet

# Modules outside of the blocks, and those in a block: ours -> timm's.
_OUTSIDE = {
  **{f'stem_conv{i}': f'stem.conv{i + 1}' for i in range(4)},
  'final_conv': 'final_conv',
  'linear': 'head.fc',
}
_IN_BLOCK = {
  'conv0': 'conv1',
  'conv1': 'conv2',
  'conv1b': 'conv2b',
  'conv2': 'conv3',
  'conv_shortcut': 'downsample.conv',
  'squeeze_excite/~/linear': 'attn_last.fc1',
  'squeeze_excite/~/linear_1': 'attn_last.fc2',
  'eca': 'attn_last.conv',
}
_BLOCK = re.compile(r'stages\.(\d+)\.(\d+)\.')
# `dm_nfnet_*` have it, light networks do not.
_SKIP_GAIN = 'skipinit_gain'


class LayoutError(ValueError):
  """Arrays are not those of an NFNet of timm."""


def is_timm(arrays: Arrays) -> bool:
  """Return whether arrays have the names that timm gives an NFNet's."""
  return 'stem.conv1.weight' in arrays


def from_timm(arrays: Arrays) -> dict[str, dict[str, np.ndarray]]:
  """Convert timm's arrays to the published names and layouts.

  Args:
    arrays: name -> array, as in the safetensors of `dm_nfnet_f0` and
      `eca_nfnet_l0`.

  Returns:
    `{module path: {name: array}}`; kernels are HWIO.

  Raises:
    LayoutError: if these do not have such an array, or have it in another
      shape; the message names it.
  """
  is_published = any(name.endswith(_SKIP_GAIN) for name in arrays)
  root = 'NFNet' if is_published else 'LightNFNet'
  ours = {theirs: ours for ours, theirs in _modules(_depth(arrays)).items()}
  params: dict[str, dict[str, np.ndarray]] = {}
  for name, array in arrays.items():
    module, _, kind = name.rpartition('.')
    if module not in ours or kind not in _FROM_TIMM:
      raise LayoutError(f"no NFNet of timm has an array '{name}'")
    try:
      if 'attn_last.fc' in module and kind == 'weight':
        array = array.reshape(array.shape[:2])
      if 'attn_last.conv' in module and kind == 'weight':
        kind, array = 'w', array.reshape(array.shape[2:])
      else:
        kind, array = _FROM_TIMM[kind](array)
    except ValueError as error:
      raise LayoutError(
        f"timm's array '{name}' has the shape {list(array.shape)}"
      ) from error
    if '.fc' in module and kind == 'bias':
      kind = 'b'
    params.setdefault(f'{root}/~/{ours[module]}', {})[kind] = array
  return params


def to_timm(params: Tree, depth: Sequence[int]) -> dict[str, np.ndarray]:
  """Convert an NFNet's parameters to timm's names and layouts.

  Args:
    params: `{module path: {name: array}}`.
    depth: number of blocks of each stage.

  Returns:
    Name -> array, as `timm.create_model('dm_nfnet_f0')`, or another name,
    takes them.
  """
  theirs = _modules(depth)
  arrays = {}
  for path, leaves in params.items():
    module = theirs[path.partition('/~/')[2]]
    for name, array in leaves.items():
      if 'attn_last.conv' in module:
        kind, array = 'weight', np.asarray(array)[None, None]
      else:
        kind, array = _TO_TIMM[name](np.asarray(array))
      if 'attn_last.fc' in module and kind == 'weight':
        array = array[:, :, None, None]
      arrays[f'{module}.{kind}'] = array
  return arrays


def _modules(depth: Sequence[int]) -> dict[str, str]:
  """Map the paths of an NFNet's modules, without their root, to timm's."""
  modules = dict(_OUTSIDE)
  for stage, blocks in enumerate(depth):
    for index in range(blocks):
      number = sum(depth[:stage]) + index
      block = f'nf_block_{number}' if number else 'nf_block'
      modules[block] = f'stages.{stage}.{index}'
      for ours, theirs in _IN_BLOCK.items():
        modules[f'{block}/~/{ours}'] = f'{modules[block]}.{theirs}'
  return modules


def _depth(arrays: Arrays) -> list[int]:
  """Count the blocks of each stage."""
  blocks = {match.groups() for match in map(_BLOCK.match, arrays) if match}
  stages = collections.Counter(stage for stage, _ in blocks)
  # A missing stage ends the list: no NFNet has stages after a gap.
  return [stages[str(stage)] for stage in range(len(stages))]


# Kernels are OIHW in timm and HWIO here; linear ones are [O, I] and [I, O].
_FROM_TIMM = {
  'weight': lambda array: ('w', np.moveaxis(array, (0, 1), (-1, -2))),
  'gain': lambda array: ('gain', array.reshape(-1)),
  'bias': lambda array: ('bias', array),
  _SKIP_GAIN: lambda array: ('skip_gain', array.reshape(())),
}
_TO_TIMM = {
  'w': lambda array: ('weight', np.moveaxis(array, (-1, -2), (0, 1))),
  'gain': lambda array: ('gain', array[:, None, None, None]),
  'bias': lambda array: ('bias', array),
  'b': lambda array: ('bias', array),
  'skip_gain': lambda array: (_SKIP_GAIN, array),
}
