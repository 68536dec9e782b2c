"""Takes statistics by evaluating a program with a probe at every site."""
