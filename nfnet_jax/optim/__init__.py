"""optax transformations: AGC, parameter groups, the recipe, the average."""
