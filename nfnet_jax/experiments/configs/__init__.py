"""Experiments, one per file; `get_config()` returns the configuration."""
