"""Optax transformations for second-order optimisation, and functions that report on their state."""
