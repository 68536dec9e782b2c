"""Checks the shapes and types in signatures while tests run: `make test SHAPES=1`."""

import numpy as np
from beartype import BeartypeConf, BeartypeHintOverrides, beartype

# An int may stand where a float is meant, as PEP 484 has it. The parameters of a traced operation may be NumPy's numbers.
NUMBERS = BeartypeHintOverrides({int: int | np.integer, float: float | int | np.integer | np.floating})
check = beartype(conf=BeartypeConf(hint_overrides=NUMBERS))
