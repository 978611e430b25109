"""Input pipelines: tf.data over TensorFlow Datasets. Never imports JAX."""

import os

# TensorFlow's start-up chatter would bury the run's own first lines.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')  # Else it says so.
