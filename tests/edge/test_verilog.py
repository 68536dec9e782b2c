"""The Verilog gives the reference's values on every stream, whatever waits, and a linter finds nothing in it."""

import itertools
import shutil
import subprocess

import numpy as np
import pytest

from kronmesh import edge
from kronmesh.edge import Conv, EdgeError, simulate
from kronmesh.edge.verilog import design, sums, thresholds
from tests.edge import networks

icarus = pytest.mark.skipif(not shutil.which('iverilog'), reason='iverilog is not installed')
verilator = pytest.mark.skipif(not shutil.which('verilator'), reason='verilator is not installed')


def check(network, styles, stalls, tool='iverilog', images=3):
  levels = networks.levels(network, images)
  simulated = simulate.simulate(design(network, styles), levels, tool, stalls)
  assert simulate.differences(network, simulated, levels) == []
  return simulated


@icarus
@pytest.mark.parametrize('style', ['serial', 'parallel'])
@pytest.mark.parametrize('name', networks.CONVS)
def test_every_stream_is_the_references(name, style):
  check(networks.random_network(networks.CONVS[name]), style, stalls=9)


@icarus
@pytest.mark.parametrize('stalls', [0, 4, 14])
def test_styles_may_change_from_layer_to_layer(stalls):
  convs = (Conv(4), Conv(4, kernel=1), Conv(4, add=1, pool=2), Conv(3))
  for styles in (['serial', 'parallel', 'serial', 'parallel', 'serial'], ['parallel', 'serial', 'parallel'] * 2):
    check(networks.random_network(convs, shape=(6, 5, 2)), styles[:5], stalls)


@icarus
@pytest.mark.parametrize('style', ['serial', 'parallel'])
def test_a_head_of_fixed_point_at_every_place(style):
  network = networks.random_network((Conv(4), Conv(5)), by_place=True, outputs=4)
  weights = np.random.default_rng(0).integers(-127, 128, network.head.weights.shape).astype(np.int8)
  check(network._replace(head=network.head._replace(weights=weights)), style, stalls=5)


@icarus
@pytest.mark.parametrize('bits', [1, 2, 3, 8])
@pytest.mark.parametrize('style', ['serial', 'parallel'])
def test_any_number_of_bits(bits, style):
  convs = (Conv(3, bits=bits), Conv(3, kernel=1, bits=bits, pool=2))
  check(networks.random_network(convs, bits=bits, shape=(4, 6, 1)), style, stalls=5)


@icarus
def test_layers_without_weights_and_channels_that_are_constant():
  network = networks.random_network((Conv(4), Conv(3)), shape=(4, 4, 1))
  first = network.layers[0]
  weights, multiplier = first.weights.copy(), first.multiplier.copy()
  weights[..., 0] = 0
  multiplier[1] = 0
  head = network.head._replace(weights=np.zeros_like(network.head.weights))
  layers = (first._replace(weights=weights, multiplier=multiplier), network.layers[1])
  for style in ('serial', 'parallel'):
    check(network._replace(layers=layers, head=head), style, stalls=3)


@icarus
def test_a_network_is_ready_for_images_one_after_another():
  """Streams have no gap between images but the zeros around them: a pixel takes `bits` cycles."""
  network = networks.random_network((Conv(4), Conv(4)), shape=(8, 8, 1))
  one, five = (check(network, 'serial', 0, images=n).cycles for n in (1, 5))
  assert (five - one) / 4 == 4 * 9 * 9


@verilator
@pytest.mark.parametrize('style', ['serial', 'parallel'])
@pytest.mark.parametrize('name', networks.CONVS)
def test_the_linter_finds_nothing(name, style, tmp_path):
  made = design(networks.random_network(networks.CONVS[name]), style)
  for file, text in made.files.items():
    (tmp_path / file).write_text(text)
  command = ['verilator', '--lint-only', '-Wall', '--top-module', made.top, *made.files]
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
  assert done.returncode == 0 and not done.stderr, done.stderr[:2000]


@verilator
@pytest.mark.long
def test_verilator_agrees():
  network = networks.random_network(networks.CONVS['residual pooled'])
  for style in ('serial', 'parallel'):
    check(network, style, 6, 'verilator', images=50)


def test_thresholds_are_the_least_sums_of_their_levels():
  for conv, seed in itertools.product((Conv(5), Conv(2, add=0), Conv(3, bits=1)), range(5)):
    network = networks.random_network((conv,), shape=(5, 5, 2), zeros=0.3, seed=seed, bits=conv.bits)
    numbers = network.layers[0]
    for o, channel in enumerate(thresholds.channels(conv, numbers, conv.bits)):
      negative = int((numbers.weights[..., o] < 0).sum()) * (2**conv.bits - 1)
      all_sums = np.arange(channel.most + 1)
      z = (int(numbers.multiplier[o]) * (all_sums - negative) + int(numbers.offset[o])) >> int(numbers.shift[o])
      low, most = (0 if conv.add is None else -(2**conv.bits)), 2**conv.bits - 1
      expected = np.clip(z, low, most) - low
      np.testing.assert_array_equal((all_sums[:, None] >= channel.thresholds).sum(1), expected)
      tree, levels = thresholds.as_tree(channel.thresholds), []
      for s in all_sums:
        node = 1
        while node < len(tree):
          node = 2 * node + (s >= tree[node])
        levels.append(node - len(tree))
      np.testing.assert_array_equal(levels, expected)


@pytest.mark.parametrize('value', range(-128, 128))
def test_digits_give_the_number_back(value):
  digits = sums.digits(value)
  assert sum(d * 2**e for e, d in digits) == value and len(digits) <= 4
  exponents = [e for e, _ in digits]
  assert all(b - a > 1 for a, b in itertools.pairwise(exponents))


def test_what_cannot_be_written_is_refused(monkeypatch):
  network = networks.random_network((Conv(3),))
  with pytest.raises(EdgeError, match="layer 1: the style 'fast' is unknown; choose from serial, parallel"):
    design(network, ['serial', 'fast'])
  with pytest.raises(EdgeError, match='1 styles for 1 layers and a head'):
    design(network, ['serial'])
  wide = network.layers[0]._replace(multiplier=np.full(3, 2**31 - 1))
  with pytest.raises(EdgeError, match=r'layer 0: its sums may reach .* narrower, sparser or of fewer bits'):
    design(network._replace(layers=(wide,)))
  twice = networks.random_network((Conv(4), Conv(4, add=1), Conv(4, add=1)))
  with pytest.raises(EdgeError, match='two layers add the same stream'):
    design(twice)
  monkeypatch.setenv('PATH', '')
  for tool in simulate.TOOLS:
    with pytest.raises(EdgeError, match=f'{tool} is not installed; install Debian package {tool}'):
      simulate.simulate(design(network), networks.levels(network, 1), tool)


def test_streams_have_their_shapes():
  network = networks.random_network(networks.CONVS['pooled'])
  shapes = [s.shape[1:] for s in edge.streams(network, networks.levels(network, 1))[:-1]]
  assert [(s.rows, s.columns, s.channels) for s in design(network).streams[:-1]] == shapes
