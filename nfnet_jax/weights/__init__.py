"""Reading and writing weights: published, trained, folded for inference."""
