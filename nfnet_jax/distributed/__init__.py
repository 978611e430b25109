"""Several processes as one run, on top of `jax.distributed`."""
