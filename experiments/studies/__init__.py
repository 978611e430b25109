"""What studies share: training many runs, tables, the look of figures."""

import os

# Before anything imports TensorFlow, as all commands do.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
