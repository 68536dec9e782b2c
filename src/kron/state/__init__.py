"""What an optimiser keeps of the factors: stacks, their owners, averages and inverses."""
