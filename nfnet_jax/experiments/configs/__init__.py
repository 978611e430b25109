"""Experiments, one a file; `get_config()` returns the configuration."""
