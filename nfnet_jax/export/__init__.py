"""Folded networks as programs for other runtimes."""
