"""Local files and buckets: atomic writes, and temporary failures."""

from __future__ import annotations
