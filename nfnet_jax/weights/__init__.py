"""Read, identify and write trained weights, and run them on images."""
