"""How statistics are taken: a program is evaluated with a probe at every site."""
