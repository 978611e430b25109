"""Fast paths: other ways to compute a network's values.

Each is an option of `nfnet.NFNet`, off by default. `fast_convs` is also an
option of light NFNets, batch-normalised NFNets and EfficientNets.
Parameters are the same; values and gradients differ by rounding and the order
of sums.

- `fast_stem` (`stem.py`) computes the stem's convolutions on blocks of pixels
  laid out on the channel axis, so that they fill the 128 lanes of a TPU. It
  pays on TPUs and needs images whose sides are multiples of `stem.BLOCK`.
- `fused_blocks` (`blocks.py`) computes residual blocks, GELU and weight
  standardisation in fewer passes over memory, forward and backward. It pays on
  all platforms.
- `fast_convs` (`convolutions.py`) computes a grouped convolution as one plain
  convolution per group, a depthwise one as a sum of shifted images, and 1x1
  convolutions as matrix products. It pays on CPUs.

`fast_stem` and `fused_blocks` hold channels in another order and therefore need
an activation that works on each channel separately; see
`layers.ACROSS_CHANNELS`.
"""

from __future__ import annotations

PATHS = ('fast_stem', 'fused_blocks', 'fast_convs')
