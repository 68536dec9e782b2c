"""Checks the shapes and types in signatures while tests run: `make test SHAPES=1`."""

from beartype import BeartypeConf, beartype

# Numbers may be given as ints where a float is meant, as PEP 484 has it.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
