"""From the name of an experiment to the objects of a run."""
