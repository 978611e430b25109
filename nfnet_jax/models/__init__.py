"""Haiku modules: one family a file, and the table of models."""
