"""Checks that statistics of real networks gather nothing over the batch's axes, and that devices compute their shares.

The long tests compile the programs with statistics at 8 devices, and ResNet-50's at 64, and hold them against
golden_real.json, which `python scripts/gathers.py --devices=8,64 --golden=tests/parallel/golden_real.json` writes.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.parallel.real_sizes import ARCHITECTURES, measured, program

GOLDEN = Path(__file__).parent / 'golden_real.json'
VERSION = '.'.join(jax.__version__.split('.')[:2])
# Whose plain gradient gathers: the loss compares all pairs, or XLA does not divide the derivative.
GATHERED_BY_THE_LOSS = ('siamese, all pairs, learned temperature', 'grouped convolutions')


@pytest.mark.brief('False')
@pytest.mark.parametrize('placed', [True, False])
def test_two_convolutions_gather_nothing(placed):
  case = ARCHITECTURES['two 3x3 convolutions']()
  eight = program(case, 8, 8 * case.each, placed=placed)
  one = program(case, 1, 8 * case.each, placed=placed)
  assert eight.gathered == 0
  assert 8 * eight.flops < 1.1 * one.flops


def rows():
  return json.loads(GOLDEN.read_text()).get(VERSION, {})


def check(found, name, devices):
  """Compares what `measured` returned with the golden row, if there is one for this JAX."""
  assert moved(found['collectives']) == 0 or name in GATHERED_BY_THE_LOSS
  key = f'{name} | sampled | {devices}'
  if key not in rows():
    pytest.skip(f'golden_real.json has no {key!r} for jax {VERSION}')
  row = rows()[key]
  # How many arrays share one collective is the compiler's affair; what they move is not.
  assert {k: n for k, (_, n) in found['collectives'].items()} == {k: n for k, (_, n) in row['statistics'].items()}
  assert found['flops'] == pytest.approx(row['flops'], rel=0.01)


def moved(collectives):
  """Counts the bytes that move other than as a sum."""
  return sum(n for kind, (_, n) in collectives.items() if not kind.startswith('all-reduce'))


@pytest.mark.long
@pytest.mark.parametrize('name', ARCHITECTURES)
def test_an_architecture_gathers_nothing_at_8_devices(name):
  check(measured(name, 8), name, 8)


@pytest.mark.long
def test_resnet50_gathers_nothing_at_64_devices():
  command = [sys.executable, '-m', 'tests.parallel.real_sizes', 'ResNet-50', '64']
  done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
  check(json.loads(done.stdout.splitlines()[-1]), 'ResNet-50', 64)


def test_the_golden_table_has_no_gather():
  """Each backward pass may gather what the plain gradient's does: the sampled Fisher has two."""
  for key, row in rows().items():
    passes = 2 if ' | sampled | ' in key else 1
    assert moved(row['statistics']) <= passes * moved(row['plain']), key
    assert row['share'] < 1.1 * row.get('plain share', 1.0), key
