"""Reading and writing weights: published, of timm, of this project."""
