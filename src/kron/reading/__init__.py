"""How a program is read: which parameters meet data, where, and by which rules."""
