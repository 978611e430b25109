"""Formats of image files: what is read, by TensorFlow or by Pillow.

Pillow reads every format. TensorFlow decodes JPEG, PNG and GIF faster, and
decodes only the part of a JPEG that is needed. `for_tensorflow` decides between
them for training and evaluation; `predict` uses Pillow only.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
import tensorflow as tf

from nfnet_jax import images

_JPEG = b'\xff\xd8\xff'
# First bytes of the formats that TensorFlow decodes. It decodes BMP and WebP
# too, but not every kind of them.
_TENSORFLOW = (_JPEG, b'\x89PNG', b'GIF8')
# Bytes of a JPEG among which the EXIF segment begins.
_HEAD = 4096


def for_tensorflow(encoded: tf.Tensor) -> tf.Tensor:
  """Return an image in bytes that TensorFlow decodes to the upright image.

  JPEG, PNG and GIF stay as they are, except JPEGs that EXIF says to turn. Those
  and all other formats are decoded by Pillow and encoded without loss. Bytes
  that Pillow cannot decode stay as they are, too.
  """
  starts_with = lambda magic: tf.strings.substr(encoded, 0, len(magic)) == magic
  head = tf.strings.substr(encoded, 0, _HEAD)
  has_exif = tf.strings.regex_full_match(head, r'\C*Exif\C*')
  is_known = tf.reduce_any([starts_with(magic) for magic in _TENSORFLOW])
  convert = lambda: tf.ensure_shape(
    tf.numpy_function(_as_bmp, [encoded], tf.string, stateful=False), []
  )
  return tf.cond(
    is_known & ~(starts_with(_JPEG) & has_exif), lambda: encoded, convert
  )


def _as_bmp(scalar: np.ndarray | bytes) -> bytes:
  """Encode an image as BMP; JPEGs that need not be turned stay as they are.

  Args:
    scalar: the image as TensorFlow passes it, bytes in graphs and otherwise an
      array.
  """
  encoded = np.asarray(scalar, object).item()
  try:
    if encoded.startswith(_JPEG):
      with Image.open(io.BytesIO(encoded)) as image:
        if image.getexif().get(Image.ExifTags.Base.Orientation, 1) == 1:
          return encoded
    bmp = io.BytesIO()
    Image.fromarray(images.decode(io.BytesIO(encoded))).save(bmp, 'BMP')
  except Exception:  # TensorFlow reports it as an image that it cannot decode.
    return encoded
  return bmp.getvalue()
