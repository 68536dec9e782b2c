"""Statistics, which are taken by evaluating a program with a probe at every site."""
