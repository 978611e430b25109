"""A training run: state, step, loop, evaluation, checkpoints, metrics."""

from __future__ import annotations
