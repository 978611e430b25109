"""optax transformations: AGC, other clipping rules, the recipe, the EMA."""

from __future__ import annotations
