"""Weights: published, of timm, of this project, folded for inference."""
