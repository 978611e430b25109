"""Fold networks for inference, and export them as programs."""

from __future__ import annotations
