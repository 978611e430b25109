"""The commands, and the configurations of experiments in `configs`."""
