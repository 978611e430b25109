"""Input pipelines: tf.data over TensorFlow Datasets. Never imports JAX."""

from __future__ import annotations
