"""Haiku modules, one family per file, and the table of models (`registry`)."""

from __future__ import annotations
