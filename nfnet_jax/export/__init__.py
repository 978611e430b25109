"""Fold networks for inference, and export them as programs."""
