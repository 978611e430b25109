"""Read, identify and write trained weights, and run them on images."""

from __future__ import annotations
