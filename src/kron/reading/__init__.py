"""The reading of a program: which parameters meet data, where, and by which rules."""
