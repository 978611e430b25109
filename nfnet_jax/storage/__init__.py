"""Local files and buckets: atomic writes, and failures that may pass."""
