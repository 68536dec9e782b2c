"""The part of an optimiser's state that concerns the factors: stacks, their owners, averages and inverses."""
