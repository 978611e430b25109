"""Compile the training step for a TPU pod without one, and read its costs."""

from __future__ import annotations
