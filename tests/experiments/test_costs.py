"""The compiled K-FAC step does not grow unnoticed: its flops and bytes against stored figures, within 5 %."""

import json

import pytest

from tests.experiments.costs import CASES, STORED, costs, version


def changed(found, stored):
  """What differs by more than 5 %, in words."""
  said = []
  for program in sorted({*found, *stored}):
    for kind in ('flops', 'bytes'):
      new, old = (table.get(program, {}).get(kind, 0) for table in (found, stored))
      if abs(new - old) > 0.05 * old:
        said.append(f'{program}: {kind} {old:.4g} -> {new:.4g}')
  return said


@pytest.mark.long('autoencoder')
@pytest.mark.parametrize('preset', [pytest.param(p, marks=[pytest.mark.long] * (p != 'autoencoder')) for p in CASES])
def test_flops_and_bytes_are_those_stored(preset):
  stored = json.loads(STORED.read_text())
  if version() not in stored:
    pytest.skip(f'no figures for jax {version()}; python -m tests.experiments.costs stores them')
  said = changed(costs(preset), stored[version()][preset])
  assert not said, f'{"; ".join(said)}; if that is meant: python -m tests.experiments.costs'


def test_growth_is_seen():
  stored = {'gradient': {'flops': 100, 'bytes': 100}}
  assert not changed({'gradient': {'flops': 104, 'bytes': 96}}, stored)
  assert changed({'gradient': {'flops': 106, 'bytes': 100}}, stored) == ['gradient: flops 100 -> 106']
  assert changed({'gradient': {'flops': 100, 'bytes': 94}}, stored) == ['gradient: bytes 100 -> 94']
  assert len(changed({**stored, 'update': {'flops': 1, 'bytes': 1}}, stored)) == 2
