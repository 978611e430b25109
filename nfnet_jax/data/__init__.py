"""Input pipelines: tf.data over TensorFlow Datasets. Never imports JAX."""
