"""Keep TensorFlow on the CPU; JAX owns the accelerators."""

from __future__ import annotations

import tensorflow as tf


def hide_accelerators() -> None:
  """Hide accelerators from TensorFlow, which would take all their memory.

  Call it before TensorFlow computes anything; calling it again has no effect.

  Raises:
    RuntimeError: if TensorFlow uses an accelerator already.
  """
  for kind in ('GPU', 'TPU'):
    tf.config.set_visible_devices([], kind)
