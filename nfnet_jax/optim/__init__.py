"""optax transformations: AGC, other clipping rules, the recipe, the EMA."""
