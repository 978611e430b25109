"""Faster ways to the same values: the stem, the blocks, the convolutions."""
