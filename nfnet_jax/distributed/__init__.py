"""Several processes as one run, on top of `jax.distributed`."""

from __future__ import annotations
