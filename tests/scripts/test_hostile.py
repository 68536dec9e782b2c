"""Sixty inputs of strangers: refused in one line, or read, within 20 seconds and 4 GB; see scripts/hostile.py."""

import pytest

from scripts.hostile import attempt
from scripts.hostile_inputs import KINDS, READERS

INPUTS = [(kind, number) for kind, made in KINDS.items() for number in range(len(made))]


def test_there_are_sixty_of_twelve_kinds():
  assert len(INPUTS) == 60 and len(KINDS) == 12 and KINDS.keys() == READERS.keys()


@pytest.mark.long
@pytest.mark.parametrize('kind, number', INPUTS)
def test_an_input_is_refused_or_read(kind, number):
  found = attempt(kind, number)
  assert found.good, found
