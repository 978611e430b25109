"""Normalisation of the pixels that models take as input."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# RGB means and standard deviations of ImageNet, in pixel units.
IMAGENET_MEAN = (255 * 0.485, 255 * 0.456, 255 * 0.406)
IMAGENET_STD = (255 * 0.229, 255 * 0.224, 255 * 0.225)


def normalize_images(images: jax.Array) -> jax.Array:
  """Normalize pixels by the mean and standard deviation of ImageNet.

  Args:
    images: `[..., 3]` in 0..255, of any dtype, or with the channels of several
      pixels on the last axis.

  Returns:
    float32 of the same shape.

  Examples:
    >>> normalize_images(jnp.full((1, 2, 2, 3), 255)).dtype
    dtype('float32')

  Source: arXiv 2102.06171, appendix A.3.
  """
  pixels = images.shape[-1] // 3
  mean, std = (
    jnp.tile(jnp.asarray(rgb), pixels) for rgb in (IMAGENET_MEAN, IMAGENET_STD)
  )
  return (images.astype(jnp.float32) - mean) / std
