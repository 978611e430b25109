"""Compile the training step for a TPU pod without one, and read its costs."""
