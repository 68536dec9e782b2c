"""The optax transformations, and what they report."""
