"""What is said of kfac-jax is held against factors made by hand; the page's table has every architecture."""

import importlib.util
import re
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from kronmesh.train import kfac_jax_peer
from scripts import peer_verdicts
from tests.draws import normal
from tests.kron.gallery import GALLERY, linen
from tests.kron.unrolled import relative

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed():
  """Skips the test unless a kfac-jax that works is installed."""
  why = kfac_jax_peer.why_not() if importlib.util.find_spec('kfac_jax') else 'kfac_jax is not installed'
  if why:
    pytest.skip(why)


class Net(nn.Module):
  dilation: int

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 3), kernel_dilation=self.dilation)(x)
    return nn.Dense(3)(nn.tanh(x).mean((1, 2)))


@pytest.mark.parametrize('dilation', [1, 2])
def test_a_dilated_convolution_is_wrong_and_any_other_exact(dilation, installed):
  """By the patches themselves: kfac-jax's A is theirs, unless the kernel is dilated."""
  case = linen(Net(dilation), normal(7, 6, 6, 2))
  ours = peer_verdicts.Ours(case)
  theirs = peer_verdicts.Theirs(ours)
  found = {name: verdict for name, (verdict, _) in theirs.verdicts().items()}
  expected = {name: 'exact' if dilation == 1 or 'Dense' in name else 'wrong' for name in ours.names}
  assert found == expected and {v for v, _ in ours.verdicts().values()} == {'exact'}
  patches = jax.lax.conv_general_dilated_patches(
    case.args[0], (3, 3), (1, 1), 'SAME', rhs_dilation=(dilation, dilation), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  rows = np.asarray(patches, np.float64).reshape(-1, 2, 9).swapaxes(1, 2).reshape(-1, 18)
  number = next(k for k, (block, _) in enumerate(theirs.blocks) if 'Conv2D' in type(block).__name__)
  a = np.asarray(theirs.states[number].factors[0].value, np.float64)[:-1, :-1]
  expected = rows.T @ rows
  error = relative(a / np.linalg.norm(a), expected / np.linalg.norm(expected))
  assert (error < 1e-5) if dilation == 1 else (error > 0.1), error


def test_a_network_of_dense_layers_is_exact(installed):
  ours, theirs, frozen = peer_verdicts.look_at(GALLERY['deep autoencoder']())
  assert {verdict for verdict, _ in [*ours.values(), *theirs.values()]} == {'exact'} and not frozen


def test_the_page_has_every_architecture_and_nothing_of_ours_is_silent():
  page = (ROOT / 'docs/coverage.md').read_text()
  lines = page.split(peer_verdicts.BEGIN)[1].split(peer_verdicts.END)[0].splitlines()
  cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if line.startswith('| ')]
  names = [re.sub(r' \(\d+ frozen\)', '', own[0]) for own in cells[1:-1]]
  assert names == list(GALLERY)
  for own in cells[1:]:
    exact, silent, wrong, error = map(int, own[1:5])
    assert silent == wrong == 0 and exact + error == sum(map(int, own[5:9]))
    assert own[0] in ('hypernetwork', 'all') or error == 0
