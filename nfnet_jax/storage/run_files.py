"""Names of what a run writes to its folder, the workdir."""

from __future__ import annotations

CONFIG = 'config.json'
CLASSES = 'classes.txt'
CHECKPOINTS = 'checkpoints'
METRICS = 'metrics.jsonl'
EVENTS = 'tensorboard'
CURVES = 'curves.png'
