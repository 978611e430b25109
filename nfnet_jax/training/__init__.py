"""A training run: state, step, loop, evaluation, checkpoints, metrics."""
